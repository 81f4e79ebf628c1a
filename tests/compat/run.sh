#!/usr/bin/env bash
# The result restores with the Orbax that OpenPI pins and with the newest one, and the tool itself runs in OpenPI's environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
openpi=.venv-openpi
newest=.venv
if [ ! -e $openpi/.ready ] || [ pyproject.toml -nt $openpi/.ready ] || [ constraints-openpi.txt -nt $openpi/.ready ]; then
    "$python" -m venv $openpi
    $openpi/bin/python -m pip install --quiet --upgrade pip
    $openpi/bin/python -m pip install --quiet --constraint constraints-openpi.txt --editable . --group test
    touch $openpi/.ready
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for writer in $newest $openpi; do
    merged=$work/$(basename $writer)
    mkdir "$merged"
    $writer/bin/python tests/compat/make_merged.py "$merged"
    for reader in $openpi $newest; do
        for case in pi0_alpha pi0_fast no_suffix; do
            echo "$case, written in $writer, read in $reader"
            $reader/bin/python tests/compat/read_back.py "$(echo "$merged/$case"/*)" "$merged/$case.npz"
        done
    done
done
echo "the tests, in OpenPI's environment"
$openpi/bin/python -m pytest -n 2
