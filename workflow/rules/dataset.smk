rule dataset:
    input:
        inputs_of("dataset"),
    output:
        manifest=output_of("dataset"),
        page=report(output_of("dataset", "report.html"), caption="../report/dataset.rst", category="Data"),
    log:
        log_of("dataset", "all"),
    benchmark:
        benchmark_of("dataset", "all")
    conda:
        "../envs/pipestill.yaml"
    threads: config["operation"]["workers"]
    resources:
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=2000,
        runtime=60,
    params:
        command=command_of("dataset"),
        tracked=parameters_of("dataset"),
    shell:
        ATTEMPT
