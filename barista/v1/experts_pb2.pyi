from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RowDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_DTYPE_UNSPECIFIED: _ClassVar[RowDtype]
    ROW_DTYPE_FLOAT32: _ClassVar[RowDtype]
    ROW_DTYPE_BFLOAT16: _ClassVar[RowDtype]
ROW_DTYPE_UNSPECIFIED: RowDtype
ROW_DTYPE_FLOAT32: RowDtype
ROW_DTYPE_BFLOAT16: RowDtype

class LayerExperts(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class HeldExpert(_message.Message):
    __slots__ = ("layer", "expert", "digest")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    digest: bytes
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol_version", "name", "pid", "incarnation", "numerics_id", "model_digest", "capacity_bytes", "held_bytes", "draining", "dispatches", "term", "epoch", "held", "health")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DISPATCHES_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    name: str
    pid: int
    incarnation: str
    numerics_id: str
    model_digest: bytes
    capacity_bytes: int
    held_bytes: int
    draining: bool
    dispatches: int
    term: int
    epoch: int
    held: _containers.RepeatedCompositeFieldContainer[HeldExpert]
    health: Health
    def __init__(self, protocol_version: _Optional[int] = ..., name: _Optional[str] = ..., pid: _Optional[int] = ..., incarnation: _Optional[str] = ..., numerics_id: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., capacity_bytes: _Optional[int] = ..., held_bytes: _Optional[int] = ..., draining: bool = ..., dispatches: _Optional[int] = ..., term: _Optional[int] = ..., epoch: _Optional[int] = ..., held: _Optional[_Iterable[_Union[HeldExpert, _Mapping]]] = ..., health: _Optional[_Union[Health, _Mapping]] = ...) -> None: ...

class Health(_message.Message):
    __slots__ = ("condition", "weight", "reason", "gpus")
    class Condition(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CONDITION_UNSPECIFIED: _ClassVar[Health.Condition]
        CONDITION_HEALTHY: _ClassVar[Health.Condition]
        CONDITION_THERMAL: _ClassVar[Health.Condition]
        CONDITION_FATAL: _ClassVar[Health.Condition]
    CONDITION_UNSPECIFIED: Health.Condition
    CONDITION_HEALTHY: Health.Condition
    CONDITION_THERMAL: Health.Condition
    CONDITION_FATAL: Health.Condition
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    condition: Health.Condition
    weight: float
    reason: str
    gpus: _containers.RepeatedCompositeFieldContainer[Gpu]
    def __init__(self, condition: _Optional[_Union[Health.Condition, str]] = ..., weight: _Optional[float] = ..., reason: _Optional[str] = ..., gpus: _Optional[_Iterable[_Union[Gpu, _Mapping]]] = ...) -> None: ...

class Gpu(_message.Message):
    __slots__ = ("index", "uuid", "name", "reachable", "memory_used_bytes", "memory_total_bytes", "utilization", "temperature_celsius", "throttled", "ecc_corrected", "ecc_uncorrected", "rows_pending", "nvlinks_active", "nvlink_errors", "recovery_action", "xids")
    class XidsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    INDEX_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REACHABLE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    THROTTLED_FIELD_NUMBER: _ClassVar[int]
    ECC_CORRECTED_FIELD_NUMBER: _ClassVar[int]
    ECC_UNCORRECTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_PENDING_FIELD_NUMBER: _ClassVar[int]
    NVLINKS_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    NVLINK_ERRORS_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_ACTION_FIELD_NUMBER: _ClassVar[int]
    XIDS_FIELD_NUMBER: _ClassVar[int]
    index: int
    uuid: str
    name: str
    reachable: bool
    memory_used_bytes: int
    memory_total_bytes: int
    utilization: float
    temperature_celsius: int
    throttled: bool
    ecc_corrected: int
    ecc_uncorrected: int
    rows_pending: bool
    nvlinks_active: int
    nvlink_errors: int
    recovery_action: int
    xids: _containers.ScalarMap[int, int]
    def __init__(self, index: _Optional[int] = ..., uuid: _Optional[str] = ..., name: _Optional[str] = ..., reachable: bool = ..., memory_used_bytes: _Optional[int] = ..., memory_total_bytes: _Optional[int] = ..., utilization: _Optional[float] = ..., temperature_celsius: _Optional[int] = ..., throttled: bool = ..., ecc_corrected: _Optional[int] = ..., ecc_uncorrected: _Optional[int] = ..., rows_pending: bool = ..., nvlinks_active: _Optional[int] = ..., nvlink_errors: _Optional[int] = ..., recovery_action: _Optional[int] = ..., xids: _Optional[_Mapping[int, int]] = ...) -> None: ...

class AssignRequest(_message.Message):
    __slots__ = ("term", "epoch", "experts")
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    term: int
    epoch: int
    experts: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    def __init__(self, term: _Optional[int] = ..., epoch: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ...) -> None: ...

class AssignProgress(_message.Message):
    __slots__ = ("bytes_done", "bytes_total", "loaded")
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    bytes_done: int
    bytes_total: int
    loaded: _containers.RepeatedCompositeFieldContainer[HeldExpert]
    def __init__(self, bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., loaded: _Optional[_Iterable[_Union[HeldExpert, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("term", "epoch", "experts")
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    term: int
    epoch: int
    experts: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    def __init__(self, term: _Optional[int] = ..., epoch: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("held_bytes",)
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    held_bytes: int
    def __init__(self, held_bytes: _Optional[int] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("attach", "dispatch")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    attach: Attach
    dispatch: Dispatch
    def __init__(self, attach: _Optional[_Union[Attach, _Mapping]] = ..., dispatch: _Optional[_Union[Dispatch, _Mapping]] = ...) -> None: ...

class ExchangeReply(_message.Message):
    __slots__ = ("attached", "rows")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    attached: Attached
    rows: Rows
    def __init__(self, attached: _Optional[_Union[Attached, _Mapping]] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("protocol_version", "engine_id", "numerics_id", "model_digest", "hidden_size", "top_k", "dtype", "window")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    engine_id: str
    numerics_id: str
    model_digest: bytes
    hidden_size: int
    top_k: int
    dtype: RowDtype
    window: Window
    def __init__(self, protocol_version: _Optional[int] = ..., engine_id: _Optional[str] = ..., numerics_id: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., hidden_size: _Optional[int] = ..., top_k: _Optional[int] = ..., dtype: _Optional[_Union[RowDtype, str]] = ..., window: _Optional[_Union[Window, _Mapping]] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("name", "nonce", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    nonce: bytes
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., nonce: _Optional[bytes] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("window_accepted", "window_refusal", "epoch")
    WINDOW_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    WINDOW_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    window_accepted: bool
    window_refusal: str
    epoch: int
    def __init__(self, window_accepted: bool = ..., window_refusal: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Dispatch(_message.Message):
    __slots__ = ("step", "layer", "attempt", "epoch", "num_rows", "topk_ids", "rows")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    step: int
    layer: int
    attempt: int
    epoch: int
    num_rows: int
    topk_ids: bytes
    rows: bytes
    def __init__(self, step: _Optional[int] = ..., layer: _Optional[int] = ..., attempt: _Optional[int] = ..., epoch: _Optional[int] = ..., num_rows: _Optional[int] = ..., topk_ids: _Optional[bytes] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("step", "layer", "attempt", "status", "epoch", "not_held", "rows", "compute_nanoseconds")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[Rows.Status]
        STATUS_OK: _ClassVar[Rows.Status]
        STATUS_NOT_HELD: _ClassVar[Rows.Status]
        STATUS_FAILED: _ClassVar[Rows.Status]
    STATUS_UNSPECIFIED: Rows.Status
    STATUS_OK: Rows.Status
    STATUS_NOT_HELD: Rows.Status
    STATUS_FAILED: Rows.Status
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NOT_HELD_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NANOSECONDS_FIELD_NUMBER: _ClassVar[int]
    step: int
    layer: int
    attempt: int
    status: Rows.Status
    epoch: int
    not_held: _containers.RepeatedScalarFieldContainer[int]
    rows: bytes
    compute_nanoseconds: int
    def __init__(self, step: _Optional[int] = ..., layer: _Optional[int] = ..., attempt: _Optional[int] = ..., status: _Optional[_Union[Rows.Status, str]] = ..., epoch: _Optional[int] = ..., not_held: _Optional[_Iterable[int]] = ..., rows: _Optional[bytes] = ..., compute_nanoseconds: _Optional[int] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("layer", "expert", "row")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    row: bytes
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., row: _Optional[bytes] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("row",)
    ROW_FIELD_NUMBER: _ClassVar[int]
    row: bytes
    def __init__(self, row: _Optional[bytes] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("draining",)
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    def __init__(self, draining: bool = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
