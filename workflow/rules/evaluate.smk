rule evaluate:
    input:
        inputs_of("evaluate"),
    output:
        output_of("evaluate"),
    log:
        log_of("evaluate"),
    benchmark:
        benchmark_of("evaluate")
    wildcard_constraints:
        name=entries_of("evaluate"),
    conda:
        "../envs/pipestill.yaml"
    threads: threads_of("evaluate", "evaluation/threads")
    resources:
        **over_nodes("evaluate"),
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=4000,
        runtime=60,
    params:
        command=command_of("evaluate"),
        tracked=parameters_of("evaluate"),
    shell:
        ATTEMPT
