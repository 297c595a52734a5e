# make demo | test | lab | docs: everything lives in .venv and nothing asks a question.
PYTHON     ?= python3
VENV       ?= .venv
TORCH_ARGS ?=#  more arguments for torch's pip install: an index with a CPU or CUDA build

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check install -qq -c constraints.txt

.PHONY: demo test lab docs prepare render readme clean

demo: $(VENV)/.demo  ## set up, then an edit on the embedded model
	@$(bin)/diffedit-lab demo

test: $(VENV)/.dev   ## every notebook, and tests/
	@$(bin)/python -m pytest -n auto --maxprocesses 4

lab: $(VENV)/.lab    ## JupyterLab on the notebooks
	@$(bin)/jupyter lab --notebook-dir=nbs --LabApp.news_url=None --allow-root

docs: $(VENV)/.dev   ## the site, in _docs/
	@$(bin)/python tools/docs.py

prepare: $(VENV)/.dev  ## before a commit: notebooks -> modules, and clean notebooks
	@$(bin)/nbdev-export && $(bin)/nbdev-clean

render: $(VENV)/.dev   ## run every notebook and store its outputs
	@$(bin)/nbdev-export && TQDM_DISABLE=1 $(bin)/nbdev-test --save && $(bin)/nbdev-clean

readme: $(VENV)/.dev   ## README.md from nbs/index.ipynb
	@$(bin)/python tools/readme.py

clean:
	@rm -rf _docs _proc build dist *.egg-info nbs/nbdev.yml nbs/sidebar.yml

$(VENV)/.demo: settings.ini setup.py pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(pip) $(TORCH_ARGS) torch
	@$(pip) -e .
	@touch $@

$(VENV)/.lab $(VENV)/.dev: $(VENV)/.%: $(VENV)/.demo
	@echo "Adding the $* tools to $(VENV)."
	@$(pip) -e '.[$*]'
	@touch $@
