# Sourced by quickstart.sh, test.sh and .ci/run, which set $requirements to a requirements file. Creates .venv if there
# is none, installs the requirements and the clone itself (editable) if either has changed, and sets $python.
python=.venv/bin/python
if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "+ ${PYTHON:-python3} -m venv .venv"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, this is " + sys.version)'
    "${PYTHON:-python3}" -m venv .venv
fi
wanted=$(pwd && cat pyproject.toml requirements*.txt)
if [ "$wanted" != "$(cat ".venv/installed-$requirements" 2>/dev/null)" ]; then
    echo "+ $python -m pip install -r $requirements -e ."
    "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements" -e .
    printf '%s\n' "$wanted" >".venv/installed-$requirements"
fi
