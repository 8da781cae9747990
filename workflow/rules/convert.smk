rule convert:
    input:
        inputs_of("convert"),
    output:
        output_of("convert"),
    log:
        log_of("convert"),
    benchmark:
        benchmark_of("convert")
    wildcard_constraints:
        name=entries_of("convert"),
    conda:
        "../envs/pipestill.yaml"
    threads: 1
    resources:
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=16000,
        runtime=60,
    params:
        command=command_of("convert"),
        tracked=parameters_of("convert"),
    shell:
        ATTEMPT
