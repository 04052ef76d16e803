# make           the environment, then teacher, student and demo on the embedded digits
# make test      the environment, then every test
# make coverage  the tests, and which lines they run; it takes longer

PYTHON ?= python3
OUTPUT := runs/quickstart
FLAGS := --output-dir $(OUTPUT) --overwrite
# A file's tests share models that it trains, so that a file goes to one process; each has one thread of its own.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: all test coverage clean

all: .venv/ready
	.venv/bin/python train_teacher_model.py $(FLAGS)
	.venv/bin/python incremental_learning_system.py --teacher $(OUTPUT)/teacher_model.pth $(FLAGS)
	.venv/bin/python demo.py --teacher $(OUTPUT)/teacher_model.pth --student $(OUTPUT)/student_model.pth \
		--output-dir $(OUTPUT)
	@echo "Everything is in $(OUTPUT): the two models, their logs and curves, metrics.json and demo.png"

test: .venv/ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PYTEST)

coverage: .venv/ready-dev
	$(PYTEST) --cov --cov-report=term

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }  # half of one would pass for a whole one

.venv/ready: requirements.txt constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet -r requirements.txt -c constraints.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	@touch $@

clean:
	rm -rf .venv runs/quickstart
