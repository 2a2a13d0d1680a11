# One command each. `make ci` is what must pass before anything lands.
.PHONY: install test lint format docs bench bench-regression ci check-deep

install:
	pip install -r requirements-dev.txt

test:
	pytest

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

# The site, in build/site; every warning, such as a broken link, is an error
docs:
	pip install --quiet -r requirements-docs.txt
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

bench:
	python benchmarks/loss_throughput.py

# Compares with the last saved run: make bench-regression ARGS=--benchmark-compare
bench-regression:
	pytest benchmarks/regression.py --benchmark-autosave $(ARGS)

ci:
	bash .ci/run

# Slower checks, about 50 minutes; the log goes to check-deep.log, which Git ignores
check-deep:
	bash -o pipefail -c 'bash .ci/deep 2>&1 | tee check-deep.log'
