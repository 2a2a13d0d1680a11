"""Classifiers on frozen embeddings: logistic regression, k nearest neighbours, modality.

Embeddings are (N, D), of any float dtype; labels are integers (N,). No random numbers are used.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ito.scoring.metrics import check_ids, mean_per_class, unit_rows

PENALTIES = (1e0, 1e-1, 1e-2, 1e-3, 1e-4)
ITERATIONS = 100  # of L-BFGS, at most


def linear_probe(
    train_emb: torch.Tensor,
    train_labels: torch.Tensor,
    test_emb: torch.Tensor,
    test_labels: torch.Tensor,
) -> dict[str, float]:
    """Accuracy of a logistic regression on the training embeddings, like CLIP's linear probe.

    Only labels that occur in both sets are used: `train`, `test` and `classes` count what remains.
    The L2 penalty of PENALTIES is chosen on every fifth training picture of a class, starting with
    the second, and the fit is repeated on all of them; if no class has two pictures, it is the
    middle one. Returns also `top1`, `top5`, `mean_per_class`, `chance` = 1/classes, `penalty`.

    Source: Radford et al. 2021, section 3.2 (L-BFGS, the penalty by a sweep).
    Raises ValueError if shapes do not match, or if fewer than 2 labels occur in both sets.
    """
    (x, y), (x_test, y_test) = shared_classes(train_emb, train_labels, test_emb, test_labels)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    classes = int(y.max()) + 1
    held = place_in_class(y) % 5 == 1
    penalty = PENALTIES[len(PENALTIES) // 2]
    if held.any():
        right, parameters = [], None
        for candidate in PENALTIES:  # strongest first: a solution is a warm start for the next
            parameters = fit(x[~held], y[~held], classes, candidate, parameters)
            right.append(int((F.linear(x[held], *parameters).argmax(1) == y[held]).sum()))
        penalty = PENALTIES[right.index(max(right))]
    predicted = F.linear(x_test, *fit(x, y, classes, penalty))
    return accuracy(predicted, y_test, len(y)) | {"penalty": penalty}


def knn(
    train_emb: torch.Tensor,
    train_labels: torch.Tensor,
    test_emb: torch.Tensor,
    test_labels: torch.Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Accuracy of a vote of the k nearest training pictures, weighted by `exp(cos / temperature)`.

    Labels as in `linear_probe`; k is at most the number of training pictures. Source: Wu et al.
    2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"; k and
    temperature are those that DINO reports.
    Raises ValueError if shapes do not match, or if fewer than 2 labels occur in both sets.
    """
    (x, y), (x_test, y_test) = shared_classes(train_emb, train_labels, test_emb, test_labels)
    classes, k = int(y.max()) + 1, min(k, len(y))
    near, index = (unit_rows(x_test) @ unit_rows(x).T).topk(k)
    votes = torch.zeros(len(x_test), classes)
    votes.scatter_add_(1, y[index], ((near - 1) / temperature).exp())
    return accuracy(votes, y_test, len(y)) | {"k": k}


def modality_classifier(
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    image_item: torch.Tensor,
    text_item: torch.Tensor,
) -> dict[str, float]:
    """Accuracy of a linear classifier of image against text embeddings: 0.5 if they are mixed.

    A logistic regression is fitted on the rows of every other item and scored on the others. The
    accuracies of both modalities are averaged, so that unequal numbers do not matter.
    image_emb (N, D), text_emb (M, D), of the items image_item (N,), text_item (M,). Raises
    ValueError unless at least 2 items have both images and texts.
    """
    images, texts = (image_emb, image_item), (text_emb, text_item)
    both = shared("items of both modalities", image_item=images, text_item=texts)
    sides = [(emb.double(), item % 2 == 0) for emb, item in both]
    x = torch.cat([emb[fitted] for emb, fitted in sides])
    y = torch.cat([torch.full((int(f.sum()),), n) for n, (_, f) in enumerate(sides)])
    parameters = fit(x, y, 2, 1e-4)
    right = [
        (F.linear(emb[~fitted], *parameters).argmax(1) == n).double().mean()
        for n, (emb, fitted) in enumerate(sides)
    ]
    return {"classifier": ((right[0] + right[1]) / 2).item(), "classifier_chance": 0.5}


def shared_classes(train_emb, train_labels, test_emb, test_labels):
    train, test = (train_emb, train_labels), (test_emb, test_labels)
    return shared("labels that occur in both sets", train_labels=train, test_labels=test)


def shared(what: str, **sides: tuple[torch.Tensor, torch.Tensor]):
    """Unit rows and renumbered ids of the rows whose id both `sides` have: embeddings and ids, by
    the name of the ids' argument. Raises ValueError if there are fewer than 2 such ids, `what`."""
    for name, (emb, ids) in sides.items():
        check_ids(name, ids, emb)
    (_, first), (_, second) = sides.values()
    both = first[torch.isin(first, second)].unique()
    if len(both) < 2:
        raise ValueError(f"need at least 2 {what}, got {len(both)}")
    known = [(emb, ids, torch.isin(ids, both)) for emb, ids in sides.values()]
    return [(unit_rows(emb[k]), torch.searchsorted(both, ids[k])) for emb, ids, k in known]


def place_in_class(labels: torch.Tensor) -> torch.Tensor:
    """0 for the first row of its class, 1 for the second, ..."""
    order = labels.argsort(stable=True)
    count = labels.bincount()
    starts = (count.cumsum(0) - count).repeat_interleave(count)
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels)) - starts
    return place


def fit(x, y, classes: int, penalty: float, start=None):
    """Weights (C, D) and biases (C,) that minimise `cross-entropy + penalty/2 · ‖weights‖²`."""
    if start is None:
        start = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    weight, bias = (value.clone().requires_grad_() for value in start)
    minimise(
        lambda: F.cross_entropy(x @ weight.T + bias, y) + penalty / 2 * weight.square().sum(),
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-6,
    )
    return weight.detach(), bias.detach()


def minimise(loss: Callable[[], torch.Tensor], parameters: list[torch.Tensor], **options) -> None:
    """L-BFGS, with those of its options."""
    optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)


def accuracy(predicted: torch.Tensor, labels: torch.Tensor, train: int) -> dict[str, float]:
    """Of scores (N, C); train: the number of rows that were fitted."""
    classes = predicted.shape[1]
    best = predicted.topk(min(5, classes)).indices == labels[:, None]
    return {
        "top1": best[:, 0].double().mean().item(),
        "top5": best.any(1).double().mean().item(),
        "mean_per_class": mean_per_class(best[:, 0], labels),
        "chance": 1 / classes,
        "classes": classes,
        "train": train,
        "test": len(labels),
    }
