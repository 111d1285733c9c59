// sync: publish, then wait. Everything that is published was written by earlier kernels of the same stream; the fence
// and the release order it before the cell for whoever acquires that, on any GPU. The kernels after this one read with
// plain loads. One warp a rank, so that many virtual ranks can wait on one GPU and still leave it to others.
#include "ep_launch.cuh"
#include <ep_ptx.cuh>  // not "": tests lay another one in its way

namespace {

// Why a wait ended without its peer, 0 if the peer came.
__device__ uint32_t wait_for(const ep_view& own, uint32_t phase, uint32_t peer, uint32_t epoch, uint64_t deadline,
                             uint32_t* value) {
    const uint64_t* word = &ep_cell_of(own, phase, peer)->epoch_and_value;
    const uint32_t* abort = &ep_header_of(own)->abort;
    while (true) {
        const uint64_t seen = ep_load_acquire(word);
        *value = static_cast<uint32_t>(seen);
        if (static_cast<uint32_t>(seen >> 32) == epoch) return 0;
        if (ep_load_relaxed(abort)) return EP_ABORTED;
        if (ep_now_ns() > deadline) return EP_TIMED_OUT;
    }
}

__global__ void __launch_bounds__(32) sync(const __grid_constant__ ep_launch launch, uint32_t phase) {
    const ep_rank& rank = launch.ranks[blockIdx.y];
    ep_state& state = *rank.state;
    const uint32_t peer = threadIdx.x, alive = state.alive;
    const uint32_t epoch = state.epoch + (phase == EP_DISPATCH);
    const bool here = peer < rank.shape.num_ranks && (alive >> peer & 1u);
    const bool waits = here && peer != rank.rank;
    uint32_t got = here && phase == EP_DISPATCH ? state.sent[peer] : 0, lost = 0;
    ep_fence_system();
    if (waits) {
        const uint64_t word = static_cast<uint64_t>(epoch) << 32 | got;
        ep_store_release(&ep_cell_of(ep_view_of(rank, launch.at, peer), phase, rank.rank)->epoch_and_value, word);
        const ep_view own = ep_view_of(rank, launch.at, rank.rank);
        lost = wait_for(own, phase, peer, epoch, ep_now_ns() + rank.timeout_ns, &got);
        // A count that no window has room for is no peer's of ours.
        if (!lost && got > rank.shape.max_tokens) lost = EP_TIMED_OUT;
    }
    if (peer < rank.shape.num_ranks && phase == EP_DISPATCH) state.got[peer] = lost ? 0 : got;
    const uint32_t gone = __ballot_sync(~0u, lost != 0);
    const uint32_t status = __reduce_or_sync(~0u, lost);
    if (peer == 0) {
        state.epoch = epoch;
        state.alive = alive & ~gone;
        if (status) atomicOr(&state.status, status);
    }
}

}  // namespace

extern "C" int32_t ep_sync(const ep_rank* ranks, uint32_t count, uint32_t phase, void* stream) {
    if (!ep_ranks_fit(ranks, count, 0) || phase > EP_COMBINE) return EP_INVALID;
    return ep_run(sync, ranks, count, {1, 32}, stream, phase);
}
