# Sourced by quickstart.sh and test.sh, with the names of requirement files: makes .venv if it is absent, installs
# what the files ask for if they have changed since, and sets $python.
python=.venv/bin/python
if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "+ ${PYTHON:-python3} -m venv .venv"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, this is " + sys.version)'
    "${PYTHON:-python3}" -m venv .venv
fi
for file in $requirements; do
    if ! cat requirements*.txt | cmp -s - ".venv/installed-$file"; then
        echo "+ $python -m pip install -r $file"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$file"
        cat requirements*.txt >".venv/installed-$file"
    fi
done
