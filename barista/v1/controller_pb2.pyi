from barista.v1 import experts_pb2 as _experts_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_STARTING: _ClassVar[WorkerState]
    WORKER_STATE_LOADING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_DRAINED: _ClassVar[WorkerState]
    WORKER_STATE_LOST: _ClassVar[WorkerState]
    WORKER_STATE_REFUSED: _ClassVar[WorkerState]
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_STARTING: WorkerState
WORKER_STATE_LOADING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_DRAINED: WorkerState
WORKER_STATE_LOST: WorkerState
WORKER_STATE_REFUSED: WorkerState

class Worker(_message.Message):
    __slots__ = ("name", "address", "pid", "node", "state", "numerics_id", "capacity_bytes", "held_bytes", "incarnation", "detail", "restarts", "health")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_ID_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    pid: int
    node: str
    state: WorkerState
    numerics_id: str
    capacity_bytes: int
    held_bytes: int
    incarnation: str
    detail: str
    restarts: int
    health: _experts_pb2.Health
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., numerics_id: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., held_bytes: _Optional[int] = ..., incarnation: _Optional[str] = ..., detail: _Optional[str] = ..., restarts: _Optional[int] = ..., health: _Optional[_Union[_experts_pb2.Health, _Mapping]] = ...) -> None: ...

class LayerPlacement(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertReplicas]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertReplicas, _Mapping]]] = ...) -> None: ...

class ExpertReplicas(_message.Message):
    __slots__ = ("workers", "digest")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedScalarFieldContainer[str]
    digest: bytes
    def __init__(self, workers: _Optional[_Iterable[str]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class PoolState(_message.Message):
    __slots__ = ("term", "epoch", "workers", "layers", "coverage", "experts_uncovered", "moves", "pool", "problem", "model_digest", "engines")
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_UNCOVERED_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    term: int
    epoch: int
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    layers: _containers.RepeatedCompositeFieldContainer[LayerPlacement]
    coverage: float
    experts_uncovered: int
    moves: int
    pool: str
    problem: str
    model_digest: bytes
    engines: int
    def __init__(self, term: _Optional[int] = ..., epoch: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerPlacement, _Mapping]]] = ..., coverage: _Optional[float] = ..., experts_uncovered: _Optional[int] = ..., moves: _Optional[int] = ..., pool: _Optional[str] = ..., problem: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., engines: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("engine_id", "acknowledged_epoch", "loads", "term")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    acknowledged_epoch: int
    loads: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    term: int
    def __init__(self, engine_id: _Optional[str] = ..., acknowledged_epoch: _Optional[int] = ..., loads: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., term: _Optional[int] = ...) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("layer", "tokens")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker", "node")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    node: str
    def __init__(self, worker: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: int
    def __init__(self, workers: _Optional[int] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("dry_run", "move_budget", "policy")
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    MOVE_BUDGET_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    move_budget: int
    policy: str
    def __init__(self, dry_run: bool = ..., move_budget: _Optional[int] = ..., policy: _Optional[str] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("layer", "expert", "to")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    to: str
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., to: _Optional[str] = ..., **kwargs) -> None: ...

class RebalanceReply(_message.Message):
    __slots__ = ("moves", "imbalance_before", "imbalance_after", "state")
    MOVES_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_AFTER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[Move]
    imbalance_before: float
    imbalance_after: float
    state: PoolState
    def __init__(self, moves: _Optional[_Iterable[_Union[Move, _Mapping]]] = ..., imbalance_before: _Optional[float] = ..., imbalance_after: _Optional[float] = ..., state: _Optional[_Union[PoolState, _Mapping]] = ...) -> None: ...
