rule sample:
    input:
        inputs_of("sample"),
    output:
        manifest=output_of("sample"),
        grid=report(output_of("sample", "grid.png"), caption="../report/samples.rst", category="Samples"),
    log:
        log_of("sample"),
    benchmark:
        benchmark_of("sample")
    wildcard_constraints:
        name=entries_of("sample"),
    conda:
        "../envs/pipestill.yaml"
    threads: threads_of("sample", "sampling/runs/{name}/threads")
    resources:
        **over_nodes("sample"),
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=4000,
        runtime=60,
    params:
        command=command_of("sample"),
        tracked=parameters_of("sample"),
    shell:
        ATTEMPT
