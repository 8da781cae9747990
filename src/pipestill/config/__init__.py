"""Parameters: typed, frozen, checked. `params.yaml` goes in, validated objects come out, one section a stage.

Only what decides a result stands in a stage's section (and so in manifests, resume keys and DVC's `params:`);
`operation` holds the rest. This package reads parameter files and nothing else.
"""

from pipestill.config.data import (
    DataParams,
    ExampleParams,
    ExpectParams,
    FetchedFile,
    FetchParams,
    SplitParams,
)
from pipestill.config.denoisers import (
    AnyDenoiserParams,
    EdmParams,
    FlowParams,
    TrainedDenoiserParams,
    TrainedEdmParams,
    VpParams,
    denoiser_params,
)
from pipestill.config.fields import (
    Section,
)
from pipestill.config.measuring import (
    ClassifierParams,
    EvaluationParams,
    FloorParams,
    ProtocolParams,
    ReferenceParams,
    ReportParams,
)
from pipestill.config.models import (
    ConvertParams,
    EmaParams,
    NativeParams,
    NetworkParams,
    OptimizerParams,
    SolverParams,
    TeacherParams,
    TrainingParams,
    TuneParams,
)
from pipestill.config.overrides import (
    Override,
    apply,
    parse_overrides,
)
from pipestill.config.reading import (
    Checked,
    check,
    check_section,
    load,
    read_parameters,
    same,
    text_of,
)
from pipestill.config.runs import (
    ChurnParams,
    OperationParams,
    PreviewParams,
    RunParams,
    SamplingParams,
    mix_of,
)
from pipestill.config.students import (
    DistillationParams,
    DistributionMatchingParams,
    FakeScoreParams,
    GanParams,
    PoolParams,
    StudentParams,
    ValidationParams,
)
from pipestill.config.values import (
    dump_yaml,
    parse_yaml,
)
from pipestill.config.whole import (
    Params,
    contradictions,
)

__all__ = [
    "AnyDenoiserParams",
    "Checked",
    "ChurnParams",
    "ClassifierParams",
    "ConvertParams",
    "DataParams",
    "DistillationParams",
    "DistributionMatchingParams",
    "EdmParams",
    "EmaParams",
    "EvaluationParams",
    "ExampleParams",
    "ExpectParams",
    "FakeScoreParams",
    "FetchParams",
    "FetchedFile",
    "FloorParams",
    "FlowParams",
    "GanParams",
    "NativeParams",
    "NetworkParams",
    "OperationParams",
    "OptimizerParams",
    "Override",
    "Params",
    "PoolParams",
    "PreviewParams",
    "ProtocolParams",
    "ReferenceParams",
    "ReportParams",
    "RunParams",
    "SamplingParams",
    "Section",
    "SolverParams",
    "SplitParams",
    "StudentParams",
    "TeacherParams",
    "TrainedDenoiserParams",
    "TrainedEdmParams",
    "TrainingParams",
    "TuneParams",
    "ValidationParams",
    "VpParams",
    "apply",
    "check",
    "check_section",
    "contradictions",
    "denoiser_params",
    "dump_yaml",
    "load",
    "mix_of",
    "parse_overrides",
    "parse_yaml",
    "read_parameters",
    "same",
    "text_of",
]
