# Snakemake runs this in the environment that it has made, from the project's root.
pip install -r requirements.txt
pip install --no-deps --no-build-isolation -e .
