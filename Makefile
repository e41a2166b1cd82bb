PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
OLDEST := $(VENV)/oldest
# Only tests see it: with it, every import of transformers takes longer and warns.
TORCHAO := $(VENV)/torchao
ENGINES := $(VENV)/engines
# An environment of its own: the torchvision of PyPI does not import beside the torch of the other.
TORCHVISION := .venv-torchvision

ARGS ?=
IMAGE ?=
QUESTION ?=
# Taken literally, so that a `$` in a question survives make.
override IMAGE := $(value IMAGE)
override QUESTION := $(value QUESTION)
export IMAGE QUESTION

# Measuring coverage doubles the time until the first test; a part of the suite says nothing about the whole.
COVERAGE := $(if $(CI),$(if $(ARGS),,--cov=flexkit --cov-report=term --cov-fail-under=95))

RUN = PYTHONPATH=$(BEFORE)$(abspath $(TORCHAO)) PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(PY) -m pytest -n logical --maxprocesses=8 --dist worksteal
OLDEST_TESTS := $(addprefix tests/,checkpoints distributed families patching processing training ways)
# These ask flexkit or torch, and transformers nothing that the others do not ask as well.
NEWEST_ONLY := $(addprefix patching/test_,config errors gate laws_everything laws_finite laws_selection pyramid) \
               $(addprefix training/test_,example processes trainer) $(addprefix ways/test_,compile context_compile)

.PHONY: help venv test test-oldest test-engines test-torchvision fuzz coverage matrix demo docs browser package lint types format clean
.DELETE_ON_ERROR:

help:
	@echo "make test                run all tests and doctests     (make test ARGS='-k policy' for some)"
	@echo "make test-oldest         run those that meet other packages with the lowest supported versions"
	@echo "make test-engines        run those of flexkit in other engines, which it installs first"
	@echo "make test-torchvision    run those of processors that need torchvision, which it installs first (6 GB)"
	@echo "make fuzz                run those that throw anything at flexkit, for long"
	@echo "make coverage            the same, and at least 95 % of lines covered"
	@echo "make matrix              write docs/support.csv, the table of supported models, from what the tests find"
	@echo "make demo                see it look closer             (IMAGE=photo.jpg QUESTION='What is it?')"
	@echo "make docs                build docs/_build/html and run the examples in it"
	@echo "make browser             build them and look at them, and at the trace page, in Chromium, if there is one"
	@echo "make package             build dist/, and try it in fresh environments, with the newest and the lowest versions"
	@echo "make lint types          check style and types"
	@echo "make format              rewrite the code in the project's style"
	@echo "make venv                only set up .venv              (PYTHON=python3.12 for another Python)"
	@echo "make clean               remove what was built, .venv included"

venv: $(STAMP)

# The stamp is written last: without it .venv is half-made, or not ours, and is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("flexkit needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@test -e $@ || { echo "Setting up $(VENV), once; this takes a few minutes."; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@rm -f $@
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[viz,train,tiff,video,docs,dev]'
	@touch $@

test: $(TORCHAO)/.stamp
	$(RUN) $(COVERAGE) $(ARGS)

# What meets other packages, with the lowest supported versions of all but torch in front of the newest.
test-oldest: BEFORE := $(abspath $(OLDEST)):
test-oldest: $(OLDEST)/.stamp $(TORCHAO)/.stamp
	$(RUN) $(OLDEST_TESTS) $(NEWEST_ONLY:%=--ignore=tests/%.py) $(ARGS)

# What runs flexkit and is no part of its environment: lmms-eval, servers.
test-engines: BEFORE := $(abspath $(ENGINES)):
test-engines: $(ENGINES)/.stamp $(TORCHAO)/.stamp
	$(RUN) tests/integrations $(ARGS)

# Video processors, and image processors that are not there without torchvision.
test-torchvision: PY := $(TORCHVISION)/bin/python
test-torchvision: $(TORCHVISION)/.stamp
	$(RUN) tests/processing tests/families/test_processors.py tests/commands/test_trace_videos.py tests/examples/test_long_video.py $(ARGS)

$(TORCHVISION)/.stamp: pyproject.toml constraints.txt constraints-torchvision.txt
	@rm -rf $(TORCHVISION)
	@$(PYTHON) -m venv $(TORCHVISION)
	@grep -v '^torch==' constraints.txt > $(TORCHVISION)/constraints.txt
	@$(PY) -m pip install -q --disable-pip-version-check -c $(TORCHVISION)/constraints.txt -r constraints-torchvision.txt -e '.[viz,train,tiff,video,dev]'
	@touch $@

$(TORCHAO)/.stamp: $(STAMP)
	@rm -rf $(TORCHAO)
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt --target $(TORCHAO) torchao
	@touch $@

$(OLDEST)/.stamp: constraints-oldest.txt $(STAMP)
	@rm -rf $(OLDEST)
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(OLDEST) -r $<
	@touch $@

$(ENGINES)/.stamp: constraints-engines.txt $(STAMP)
	@rm -rf $(ENGINES)
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(ENGINES) -r $<
	@touch $@

fuzz: override ARGS += -m fuzz --hypothesis-profile=fuzz
fuzz: test

coverage:
	@$(MAKE) test CI=1

matrix:
	@WRITE_MATRIX=1 $(MAKE) test ARGS="$(addprefix tests/families/test_,types.py full_attention.py own_states.py context.py processors.py)"

demo: $(STAMP)
	@$(PY) -m flexkit demo $${IMAGE:+--image "$$IMAGE"} $${QUESTION:+--question "$$QUESTION"}

docs: $(STAMP)
	$(PY) -m sphinx -EWn --keep-going -q -d docs/_build/doctrees -b html docs docs/_build/html
	$(PY) -m sphinx -Wn --keep-going -q -d docs/_build/doctrees -b doctest docs docs/_build/doctest

# Leaves screenshots in docs/_build/screenshots.
browser: docs
	@$(MAKE) test ARGS="tests/browser $(ARGS)"

# As strangers get it: nothing of this folder but what is in dist.
package: $(STAMP)
	rm -rf build dist
	$(PY) -m build
	@for versions in constraints constraints-oldest; do \
		$(PYTHON) -m venv build/$$versions && cd build/$$versions && echo "flexkit demo, with $$versions.txt:" && \
		bin/pip install -q --no-compile --disable-pip-version-check -c ../../$$versions.txt $$(grep ^torch== ../../constraints.txt) ../../dist/*.whl && \
		PYTHONPATH= HF_HUB_OFFLINE=1 bin/flexkit demo && cd ../.. || exit 1; \
	done

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) $(TORCHVISION) build dist docs/_build docs/gallery .coverage .coverage.* htmlcov
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
