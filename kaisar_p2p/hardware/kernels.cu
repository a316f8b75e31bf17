// The two steps of a compute proof around the matrix product, one thread per keystream block or one block per tile.
// Compiled by NVRTC when the CuPy backend starts; tests compile the same text with a C++ compiler and compare bits.
#ifndef ON_HOST
typedef unsigned int u32;
typedef unsigned long long u64;
#define WARP_SUM(x) for (int offset = 16; offset; offset >>= 1) x += __shfl_down_sync(0xffffffffu, x, offset)
#define FIRST_LANE ((threadIdx.x & 31) == 0)
#endif
#define ROTATE(x, bits) (((x) << (bits)) | ((x) >> (32 - (bits))))
#define QUARTER(a, b, c, d)              \
  a += b; d ^= a; d = ROTATE(d, 16);     \
  c += d; b ^= c; b = ROTATE(b, 12);     \
  a += b; d ^= a; d = ROTATE(d, 8);      \
  c += d; b ^= c; b = ROTATE(b, 7);

// Rows of A or B as int8: ChaCha20 (RFC 8439) under nonce (matrix, row, 0), each byte b becoming (b & 31) - 16.
// out: rows x (64 * blocks) bytes, written as words.
extern "C" __global__ void fill_rows(const u32* key, u32 matrix, u32 first_row, u32 rows, u32 blocks, u32* out) {
  u64 id = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (id >= (u64)rows * blocks) return;
  u32 start[16] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u, key[0], key[1], key[2], key[3],
                   key[4], key[5], key[6], key[7], (u32)(id % blocks), matrix, first_row + (u32)(id / blocks), 0u};
  u32 x[16];
  #pragma unroll
  for (int i = 0; i < 16; i++) x[i] = start[i];
  #pragma unroll
  for (int i = 0; i < 10; i++) {
    QUARTER(x[0], x[4], x[8], x[12]) QUARTER(x[1], x[5], x[9], x[13])
    QUARTER(x[2], x[6], x[10], x[14]) QUARTER(x[3], x[7], x[11], x[15])
    QUARTER(x[0], x[5], x[10], x[15]) QUARTER(x[1], x[6], x[11], x[12])
    QUARTER(x[2], x[7], x[8], x[13]) QUARTER(x[3], x[4], x[9], x[14])
  }
  #pragma unroll
  for (int i = 0; i < 16; i++) {
    u32 word = x[i] + start[i];
    // (b & 31) - 16 in each byte: the low four bits, and the sign spread upwards where bit 4 is clear.
    out[id * 16 + i] = (word & 0x0f0f0f0fu) | ((~word & 0x10101010u) * 15u);
  }
}

__device__ __forceinline__ u32 fmix32(u32 x) {
  x ^= x >> 16; x *= 0x85ebca6bu;
  x ^= x >> 13; x *= 0xc2b2ae35u;
  return x ^ x >> 16;
}

// Tags of a panel of C (int32, rows x n, row-major) into zeroed tags, one CUDA block per t x t tile.
extern "C" __global__ void tile_tags(const u32* product, u32 n, u32 t, u32* tags) {
  u32 across = n / t, i = blockIdx.x / across, j = blockIdx.x % across, sum = 0;
  const u32* tile = product + (u64)i * t * n + (u64)j * t;
  for (u32 e = threadIdx.x; e < t * t; e += blockDim.x)
    sum += fmix32(tile[(u64)(e / t) * n + e % t] + e * 0x9E3779B1u);
  WARP_SUM(sum);
  if (FIRST_LANE) atomicAdd(&tags[blockIdx.x], sum);
}
