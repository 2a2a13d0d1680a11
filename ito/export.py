"""`python -m ito.export RUN`: export the dual encoder of a run's newest checkpoint, or of the best.

Writes the format that `ito.load` reads and, on request, two ONNX models, and a folder for open_clip
or transformers.
"""

from contextlib import nullcontext
from pathlib import Path

from ito.checkpoint import load_checkpoint
from ito.cli import Parser, output_path, shown, user_errors
from ito.files import follow_links, undamaged
from ito.model.exported import built, export, saved_tokenizer
from ito.run import BEST_BY, RunFolder, locked, refuse_strange
from ito.scoring.model_card import write_card


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m ito.export", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder; its newest checkpoint is exported")
    parser.add_argument("--out", type=Path, help="output folder (default: RUN/model)")
    parser.add_argument(
        "--best",
        action="store_true",
        help=f"export the checkpoint with the best {BEST_BY} of the validation splits, instead of "
        "the newest; search and the other commands then use it",
    )
    parser.add_argument(
        "--onnx", action="store_true", help="also write image_encoder.onnx and text_encoder.onnx"
    )
    parser.add_argument(
        "--open-clip",
        type=Path,
        metavar="FOLDER",
        help='also write a folder for open_clip\'s "local-dir:FOLDER"; the run needs --patch-size '
        "or --pretrained open_clip:NAME",
    )
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="FOLDER",
        help="also write a folder for transformers' from_pretrained and for SentenceTransformer; "
        "the run needs --pretrained hf:NAME",
    )
    with user_errors():
        options = parser.parse_args(arguments)
        run = RunFolder(options.run)
        out = output_path("--out", options.out or run.model)
        if options.open_clip:
            output_path("--open-clip", options.open_clip)
        if options.hf:
            output_path("--hf", options.hf)
        best = run.log().best() if options.best else None
        if options.best and best is None:
            raise ValueError(f"--best: {run.metrics} has no evaluation with {BEST_BY}")
        state = load_checkpoint(run.checkpoints, best)
        with undamaged(run.checkpoints):
            model = built(state["architecture"], state["model"])
            load_size, step = state["load_size"], state["step"]
            fit = state.get("fit", "crop")  # older versions had no other
        tokenizer = saved_tokenizer(state, run)
        # a run that is training writes this model too
        own = follow_links(out) == follow_links(run.model)
        if own:
            refuse_strange(options.run)
        with locked(options.run) if own else nullcontext():
            export(model, tokenizer, load_size, step, out, fit)
            if run.config.exists():
                write_card(options.run, out)
            if options.onnx:
                from ito.model.onnx import export_onnx

                export_onnx(model, out, fit, tokenizer)
        if options.open_clip:
            from ito.model.open_clip import export_open_clip

            export_open_clip(model, tokenizer, options.open_clip, fit)
        if options.hf:
            from ito.model.hf import export_hf

            bias = state.get("objective", {}).get("logit_bias")
            export_hf(model, tokenizer, bias, options.hf, fit)
        onnx = " (safetensors and ONNX)" if options.onnx else ""
        which = f", the best by {BEST_BY}" if options.best else ", the newest"
        print(f"exported step {step}{which}, to {shown(out)}{onnx}")
        if options.open_clip:
            print(f"exported step {step} to {shown(options.open_clip)} (open_clip)")
        if options.hf:
            print(f"exported step {step} to {shown(options.hf)} (transformers)")


if __name__ == "__main__":
    main()
