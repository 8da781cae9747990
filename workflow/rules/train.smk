rule train:
    input:
        inputs_of("train"),
    output:
        output_of("train"),
    log:
        log_of("train"),
    benchmark:
        benchmark_of("train")
    wildcard_constraints:
        name=entries_of("train"),
    priority: 1
    conda:
        "../envs/pipestill.yaml"
    threads: threads_of("train", "teachers/{name}/training/threads")
    resources:
        **over_nodes("train"),
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=4000,
        runtime=240,
    params:
        command=command_of("train"),
        tracked=parameters_of("train"),
    shell:
        ATTEMPT
