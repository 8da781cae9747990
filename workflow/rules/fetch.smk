rule fetch:
    input:
        inputs_of("fetch"),
    output:
        output_of("fetch"),
    log:
        log_of("fetch"),
    benchmark:
        benchmark_of("fetch")
    wildcard_constraints:
        name=entries_of("fetch"),
    conda:
        "../envs/pipestill.yaml"
    threads: 1
    resources:
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=1000,
        runtime=60,
    params:
        command=command_of("fetch"),
        tracked=parameters_of("fetch"),
    shell:
        ATTEMPT
