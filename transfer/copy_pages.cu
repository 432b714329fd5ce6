// Pages of one pool to pages of another, all buffers in one launch, and a record in host memory once all are in place.
//
// A warp copies one piece at a time: PIECE_BYTES, which whoever compiles this defines, of one page of one buffer,
// sixteen bytes a lane, all loads in flight before the first store. Which pages is passed by value, so nothing is
// uploaded before a launch; a short list makes a short launch, hence several kernels. What a record looks like:
// transfer/landed_ring.py. A launch without a place for a record copies and says nothing; one without pages only says
// that those which others copied, before it, are there.

typedef unsigned long long u64;

template <unsigned MOST>
struct Pages {
    unsigned count;
    int source[MOST];
    int destination[MOST];
};

struct Buffer {
    u64 source;
    u64 destination;
    u64 page_bytes;
};

struct Record {
    u64 first;
    u64 second;
};

static const unsigned LANES = 32, IN_FLIGHT = PIECE_BYTES / (LANES * sizeof(uint4));

template <unsigned MOST>
__device__ __forceinline__ void copy(
    const Buffer* __restrict__ buffers, unsigned buffer_count, unsigned pieces_a_page, unsigned* blocks_done,
    Record* record, u64 first, u64 second, const Pages<MOST>& pages)
{
    const unsigned lane = threadIdx.x % LANES;
    const u64 warps = (u64)gridDim.x * (blockDim.x / LANES);
    const u64 work = (u64)pages.count * buffer_count * pieces_a_page;
    for (u64 unit = (u64)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; unit < work; unit += warps) {
        const unsigned piece = unit % pieces_a_page;
        const u64 row = unit / pieces_a_page;
        const Buffer buffer = buffers[row % buffer_count];
        const unsigned page = row / buffer_count;
        const u64 start = (u64)piece * PIECE_BYTES;
        if (start >= buffer.page_bytes) continue;
        const u64 left = buffer.page_bytes - start;
        const unsigned vectors = (left < PIECE_BYTES ? left : PIECE_BYTES) / sizeof(uint4);
        const uint4* from = (const uint4*)(buffer.source + (u64)pages.source[page] * buffer.page_bytes + start);
        uint4* to = (uint4*)(buffer.destination + (u64)pages.destination[page] * buffer.page_bytes + start);
        uint4 held[IN_FLIGHT];
#pragma unroll
        for (unsigned step = 0; step < IN_FLIGHT; step++)
            if (step * LANES + lane < vectors) held[step] = __ldcs(from + step * LANES + lane);
#pragma unroll
        for (unsigned step = 0; step < IN_FLIGHT; step++)
            if (step * LANES + lane < vectors) __stcs(to + step * LANES + lane, held[step]);
    }
    // Every store of this block before its count; every block's before the record, for the host and for the peer. A
    // fence is also one for what its thread has seen of others: one thread's will do.
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence_system();
    if (atomicAdd(blocks_done, 1) != gridDim.x - 1) return;
    *blocks_done = 0;
    if (!record) return;
    __threadfence_system();
    *(volatile u64*)&record->first = first;
    *(volatile u64*)&record->second = second;
}

#define COPY_PAGES(MOST)                                                                                          \
    extern "C" __global__ void __launch_bounds__(1024) copy_pages_##MOST(                                         \
        const Buffer* __restrict__ buffers, unsigned buffer_count, unsigned pieces_a_page, unsigned* blocks_done, \
        Record* record, u64 first, u64 second, const __grid_constant__ Pages<MOST> pages)                         \
    {                                                                                                             \
        copy<MOST>(buffers, buffer_count, pieces_a_page, blocks_done, record, first, second, pages);              \
    }

COPY_PAGES(64)
COPY_PAGES(1024)
COPY_PAGES(4000)
