# pipestill's stages, run where they are out of date. What a stage is (command, inputs, outputs, parameters) stands in
# dvc.yaml; the rules add what a scheduler needs.
from pipestill import started
from snakemake.utils import min_version, validate

min_version("9.9")


configfile: str(started.parameters())


include: "workflow/rules/common.smk"
include: "workflow/rules/terminal.smk"


validate(config, "workflow/schemas/params.schema.json", set_default=False)


include: "workflow/rules/example.smk"
include: "workflow/rules/fetch.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/reference.smk"
include: "workflow/rules/convert.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/tune.smk"
include: "workflow/rules/distill.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        manifests(),


onstart:
    keep_parameters()
    say_how_long()


onsuccess:
    let_dvc_record()
    say_what_changed()


onerror:
    let_dvc_record()
    say_what_changed()
    say_what_failed()
