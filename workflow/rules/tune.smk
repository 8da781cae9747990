rule tune:
    input:
        inputs_of("tune"),
    output:
        output_of("tune"),
    log:
        log_of("tune"),
    benchmark:
        benchmark_of("tune")
    wildcard_constraints:
        name=entries_of("tune"),
    conda:
        "../envs/pipestill.yaml"
    threads: threads_of("tune", "tune/{name}/threads")
    resources:
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=4000,
        runtime=60,
    params:
        command=command_of("tune"),
        tracked=parameters_of("tune"),
    shell:
        ATTEMPT
