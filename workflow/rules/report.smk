rule report:
    input:
        inputs_of("report"),
    output:
        manifest=output_of("report"),
        page=report(output_of("report", "index.html"), caption="../report/page.rst", category="Report"),
    log:
        log_of("report", "all"),
    benchmark:
        benchmark_of("report", "all")
    conda:
        "../envs/pipestill.yaml"
    threads: 1
    resources:
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=2000,
        runtime=10,
    params:
        command=command_of("report"),
        tracked=parameters_of("report"),
    shell:
        ATTEMPT
