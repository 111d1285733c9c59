"""The trunk on a device: as router.model.trunk, with the rows of a step on the device from embedding to logits."""

from __future__ import annotations

import torch
from torch import Tensor

from experts.device.pool import DevicePool
from experts.kernels.reference import rms_norm
from router.kv_cache.storage import allocate_device_cache, nowhere
from router.model.batch import Batch
from router.model.device.contexts import context
from router.model.device.graphs import MAX_ROWS, Capture, GraphedDecode
from router.model.device.layers import DeviceLayer
from router.model.device.rows import Rows, StepInputs, to_device
from router.model.rope import cos_sin_table
from router.model.spec import ModelSpec
from router.model.trunk import Load


class DeviceTrunk:
    """A loaded model. load: gives tensors on the device, dequantised. pool: takes and gives rows on the device.

    capture: turns decode steps into graphs; None: every step is computed kernel by kernel.
    """

    def __init__(
        self,
        spec: ModelSpec,
        load: Load,
        pool: DevicePool | None,
        max_len: int,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self.spec, self.max_len, self.device = spec, max_len, device
        self._embedding: Tensor = load("model.embed_tokens.weight")
        self._final_norm: Tensor = load("model.norm.weight")
        self._head: Tensor = self._embedding if spec.tied_embeddings else load("lm_head.weight")
        self._cos, self._sin = (table.to(device) for table in cos_sin_table(spec.attention.rope, max_len))
        self._layers = [DeviceLayer(spec, index, load, pool) for index in range(spec.num_layers)]
        self._pool, self._capture = pool, capture
        self._graphed: tuple[Tensor, GraphedDecode] | None = None
        self._generation = 0  # of the pool for which they were captured

    def allocate_cache(self, num_blocks: int, block_size: int) -> Tensor:
        """See router.kv_cache.storage.allocate_device_cache."""
        return allocate_device_cache(self.spec, num_blocks, block_size, self._final_norm.dtype, self.device)

    def forward(self, batch: Batch, cache: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One step. batch: on the CPU. cache: of allocate_cache; its slots of this batch are written.

        Returns, on the CPU, logits [num_samples, vocab] float32 and failed [num_tokens] bool, as Trunk.forward. A step
        in which a worker was lost is computed again, and writes the same slots again.
        """
        pool = self._pool
        if pool is None:
            return self._step(batch, cache, step)
        while True:
            generation = pool.prepare()
            if generation != self._generation:
                self._generation, self._graphed = generation, None
            outputs = self._step(batch, cache, step)
            if pool.settle():
                return outputs

    def _step(self, batch: Batch, cache: Tensor, step: int) -> tuple[Tensor, Tensor]:
        num_seqs = len(batch.block_tables)
        if self._capture is not None and num_seqs == len(batch.token_ids) <= MAX_ROWS:
            logits, failed = self._decode(self._capture, cache)(batch)
            logits = logits if len(batch.sample_rows) == num_seqs else logits[batch.sample_rows.to(self.device)]
        else:
            wanted = batch.sample_rows.to(self.device)
            self._begin(len(batch.token_ids))
            logits, failed = self._compute(to_device(batch, self.device), cache, step, wanted)
        return logits.to("cpu", copy=True), failed.to("cpu", copy=True)  # the next step overwrites a graph's outputs

    def _decode(self, capture: Capture, cache: Tensor) -> GraphedDecode:
        """The graphs over this cache, whose address is part of them."""
        if self._graphed is None or self._graphed[0] is not cache:
            block_size = cache.shape[3]
            graphs = GraphedDecode(
                lambda inputs: self._compute(inputs, cache, 0, None),  # of no step in particular: it is repeated
                capture,
                self._begin,
                vocab_size=self.spec.vocab_size,
                block_size=block_size,
                max_width=-(-self.max_len // block_size),
                nowhere=nowhere(cache),
                device=self.device,
            )
            self._graphed = cache, graphs
        return self._graphed[1]

    def _begin(self, num_tokens: int) -> None:
        if self._pool is not None:
            self._pool.begin_step(num_tokens)

    def _compute(self, inputs: StepInputs, cache: Tensor, step: int, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of the wanted rows (None: of all) and failed, on the device. It never waits for it."""
        rows = self._rows(inputs, cache)
        failed = torch.zeros_like(rows.padding)
        update: Tensor | None = None
        for layer in self._layers:
            update, layer_failed = layer(update, rows, step)
            failed |= layer_failed
        assert update is not None
        hidden = rows.residual
        if wanted is not None:
            update, hidden = update[wanted], hidden[wanted]
        return self._logits(rms_norm(update, self._final_norm, self.spec.rms_norm_eps, residual=hidden)), failed

    def _rows(self, inputs: StepInputs, cache: Tensor) -> Rows:
        slots, positions, outside = inputs.slots.long(), inputs.positions, nowhere(cache)
        padding = slots == outside
        hidden = self._embedding.index_select(0, inputs.token_ids)
        return Rows(
            # Zeros stay finite through every layer: what padding writes is read, masked, by other rows.
            hidden.masked_fill_(padding[:, None], 0),
            cache,
            self._cos.index_select(0, positions),
            self._sin.index_select(0, positions),
            slots,
            padding,
            [context(run, positions, inputs.block_tables, cache.shape[3], outside) for run in inputs.runs],
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab] float32, summed in float32 and not rounded to the model's dtype."""
        if hidden.is_cuda and hidden.dtype is not torch.float32:
            return torch.mm(hidden, self._head.T, out_dtype=torch.float32)
        return hidden.float() @ self._head.float().T
