// Windows and what a library says of itself; the same questions are answered by ep_host.cpp.
#include "ep_launch.cuh"

extern "C" void ep_struct_sizes(uint32_t* shape, uint32_t* state, uint32_t* rank) {
    *shape = sizeof(ep_shape);
    *state = sizeof(ep_state);
    *rank = sizeof(ep_rank);
}

extern "C" uint64_t ep_window_bytes(const ep_shape* shape, ep_offsets* offsets) {
    if (!ep_valid(shape)) return 0;
    *offsets = ep_offsets_of(shape);
    return offsets->total;
}

extern "C" int32_t ep_window_format(uint8_t* window, uint64_t bytes, const ep_shape* shape) {
    if (window == nullptr || !ep_valid(shape) || !ep_window_size_fits(*shape, bytes)) return EP_INVALID;
    if (const cudaError_t error = cudaMemset(window, 0, bytes)) return -error;
    return -static_cast<int32_t>(cudaDeviceSynchronize());
}

// On a stream of its own: the one that waits is busy until this arrives. Another thread may be capturing a graph, which
// must neither forbid this nor be spoilt by it.
extern "C" int32_t ep_window_abort(uint8_t* window) {
    static const uint32_t set = 1;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    if (const cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode)) return -error;
    cudaStream_t stream;
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (!error) {
        uint8_t* word = window + offsetof(ep_header, abort);
        error = cudaMemcpyAsync(word, &set, sizeof set, cudaMemcpyHostToDevice, stream);
        if (!error) error = cudaStreamSynchronize(stream);
        cudaStreamDestroy(stream);
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    return -static_cast<int32_t>(error);
}

extern "C" const char* ep_result_text(int32_t result) {
    if (result == EP_INVALID) return "the arguments contradict one another";
    return cudaGetErrorString(static_cast<cudaError_t>(-result));
}
