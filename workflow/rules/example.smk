rule example:
    input:
        inputs_of("example"),
    output:
        output_of("example"),
    log:
        log_of("example"),
    benchmark:
        benchmark_of("example")
    wildcard_constraints:
        name=entries_of("example"),
    conda:
        "../envs/pipestill.yaml"
    threads: 1
    resources:
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=1000,
        runtime=10,
    params:
        command=command_of("example"),
        tracked=parameters_of("example"),
    shell:
        ATTEMPT
