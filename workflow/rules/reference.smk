rule reference:
    input:
        inputs_of("reference"),
    output:
        output_of("reference"),
    log:
        log_of("reference", "all"),
    benchmark:
        benchmark_of("reference", "all")
    conda:
        "../envs/pipestill.yaml"
    threads: threads_of("reference", "reference/threads")
    resources:
        **over_nodes("reference"),
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=4000,
        runtime=60,
    params:
        command=command_of("reference"),
        tracked=parameters_of("reference"),
    shell:
        ATTEMPT
