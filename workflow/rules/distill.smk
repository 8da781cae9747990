rule distill:
    input:
        inputs_of("distill"),
    output:
        output_of("distill"),
    log:
        log_of("distill"),
    benchmark:
        benchmark_of("distill")
    wildcard_constraints:
        name=entries_of("distill"),
    priority: 1
    conda:
        "../envs/pipestill.yaml"
    threads: threads_of("distill", "distillation/students/{name}/threads")
    resources:
        **over_nodes("distill"),
        attempt=lambda wildcards, attempt: attempt,
        mem_mb=4000,
        runtime=240,
    params:
        command=command_of("distill"),
        tracked=parameters_of("distill"),
    shell:
        ATTEMPT
