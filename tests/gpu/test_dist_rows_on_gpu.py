"""A layer's tensors between ranks, on a GPU: split, packed and added up to the bytes of the CPU."""

from __future__ import annotations

import pytest
import torch

from experts.transport.dist_rows import combine_anywhere, pack, split_rows, unpack
from tests.kernel_variants import DTYPES, values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_meet_on_a_gpu_as_on_the_cpu(dtype):
    topk_ids = torch.randint(-1, 9, (33, 4), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    owner = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 3])
    hidden_states, topk_weights = values(33, 72, dtype=dtype), values(33, 4, seed=2)

    def there_and_back(device: str) -> list[torch.Tensor]:
        ids, x = topk_ids.to(device), hidden_states.to(device)
        split = split_rows(ids, owner.to(device), 4)
        columns = unpack(pack(split.topk_ids, x[split.tokens]), (torch.int32, 4), (dtype, 72))
        rows = values(sum(split.num_pairs) + 1, 72, dtype=dtype, seed=3).to(device)
        rows[-1] = 0
        return [*columns, split.places, *combine_anywhere(rows, split.places, topk_weights.to(device))]

    for on_gpu, on_cpu in zip(there_and_back("cuda"), there_and_back("cpu"), strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)
