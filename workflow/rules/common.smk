# What the rules share: the stages as DVC resolves them, and how one is run.
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError

from pipestill import config as parameters_file
from pipestill import pipeline, started, surroundings, tools
from pipestill.errors import PipestillError
from pipestill.stages import fetch

BEGUN = time.time()
RUNS = os.environ.get("PIPESTILL_RUNS", "runs")
ROOT = Path(workflow.basedir)
surroundings.prepare()  # DVC, which resolves the stages, asks for the user's name
tools.put_on_path()


def resolved():
    """The project's stages; every mistake in params.yaml or dvc.yaml, and a missing git checkout, is one line."""
    try:
        if Path.cwd() != ROOT.resolve():
            raise PipestillError(f"start snakemake in {ROOT}, where dvc.yaml and params.yaml are")
        stages = started.restored(ROOT) or pipeline.load(ROOT)
        stated = parameters_file.parse_yaml(stages.text, "params.yaml")
        if not parameters_file.same(config, stated):
            if workflow.config_settings.overwrite_config:
                raise PipestillError(
                    "the stages read params.yaml alone: edit it, or use pipestill config, not --config"
                )
            raise PipestillError("params.yaml changed while it was being read: start this again")
        parameters_file.check(stated, "params.yaml", whole=True)
        config.update(stated)
    except PipestillError as error:
        raise WorkflowError(str(error)) from None
    return stages


STAGES = resolved()
ABSENT = STAGES.absent()
OUTPUTS = pipeline.output_patterns(ROOT)


def say_what_to_bring():
    """Names what no stage makes and is not here, and what fetching brings, for those without a network."""
    for path, reader in ABSENT.items():
        print(f"to be brought: {path}, which {reader} reads", file=sys.stderr)
    for stage in STAGES.named("fetch"):
        if not (ROOT / stage.manifest).exists():
            entry = parameters_file.check(config, "params.yaml").fetched[stage.entry]
            for file in fetch.missing(entry, fetch.INBOX / stage.entry):
                print(f"to be fetched, or brought where there is no network: {file}", file=sys.stderr)


if workflow.is_main_process:
    say_what_to_bring()


def manifests():
    """What every stage makes."""
    return [stage.manifest for stage in STAGES.stages]


def stage_of(name, wildcards):
    return STAGES.get(name, wildcards.get("name"))


def output_of(name, file="manifest.json"):
    """A file of the artefact that a stage makes; its folder is whole when the manifest is there."""
    return f"{OUTPUTS[name]}/{file}"


def inputs_of(name):
    """The manifests of the artefacts that the stage reads, and paths that no stage makes.

    A dry run plans without those of them that are still to be brought, which `say_what_to_bring` has named.
    """

    def files(wildcards):
        found = STAGES.input_files(stage_of(name, wildcards))
        return [path for path in found if path not in ABSENT] if workflow.dryrun else found

    return files


def command_of(name):
    return lambda wildcards: stage_of(name, wildcards).command


def parameters_of(name):
    """What DVC tracks for the stage: its section of params.yaml and its code's version."""

    def values(wildcards):
        stage = stage_of(name, wildcards)
        return {"version": stage.version, **stage.parameters}

    return values


def entries_of(name):
    """A pattern for the names of a stage's entries; one that nothing matches where there are none."""
    return "|".join(stage.entry for stage in STAGES.named(name)) or "(?!)"


def nodes_of(name):
    return config["operation"]["nodes"].get(name, 1)


def threads_of(name, dpath):
    """Threads of one rank, from the parameters, times the ranks of a node."""
    ranks = config["operation"]["ranks"].get(name, 1) // nodes_of(name)
    threads = lookup(dpath=dpath, within=config)
    return lambda wildcards: ranks * (threads(wildcards) if callable(threads) else threads)


def over_nodes(name):
    """What Slurm needs of a stage: its nodes, and over several one task for each, which `pipestill` starts itself."""
    nodes = nodes_of(name)
    if nodes == 1:
        return {"nodes": 1}

    def several(wildcards):
        arrays = getattr(workflow.executor_settings, "array_jobs", None) or ""  # known once jobs are made
        if {name, "all"} & set(re.split(r"[,;\s]+", arrays)):
            raise WorkflowError(
                f"operation.nodes.{name}={nodes}: jobs of an array have one node each; take {name} out of "
                "slurm-array-jobs in the profile"
            )
        return nodes

    return {"nodes": several, "mpi": "srun", "tasks": nodes, "tasks_per_gpu": 0}


def log_of(name, entry="{name}"):
    return f"{RUNS}/logs/{name}/{entry}.log"


def benchmark_of(name, entry="{name}"):
    return f"{RUNS}/benchmarks/{name}/{entry}.tsv"


def keep_parameters():
    """Lets every job of this run, on whatever machine, read the parameters that the run started with."""
    if workflow.is_main_process:
        os.environ[started.PARAMS] = str(started.keep(STAGES.text, STAGES.dumped()))


# One attempt at a stage, which decides whether another attempt (--retries) makes sense.
ATTEMPT = "bash workflow/scripts/attempt.sh {resources.attempt} {log:q} {params.command:q}"


def let_dvc_record():
    """Lets DVC record what finished, unless the parameters say no; the outcome of the run stays as it is."""
    if config["operation"]["record"] and tools.SYNCING not in os.environ:
        subprocess.run([sys.executable, "-m", "pipestill", "record"], check=False)
