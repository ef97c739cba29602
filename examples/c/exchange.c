/* Two processes exchange bundles, in C. Start it twice:
 *
 *   export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29400 ASYNCDIFF_AUTHKEY=$(openssl rand
 * -hex 32) RANK=0 ./exchange_c & RANK=1 ./exchange_c
 */
#include <asyncdiff/asyncdiff.h>
#include <stdio.h>
#include <stdlib.h>

enum { kBundles = 1000, kCount = 257 };

static int check(asyncdiff_code code, const char* what) {
  if (code == ASYNCDIFF_OK) return 0;
  fprintf(stderr, "%s: error %d, rank %d: %s\n", what, (int)code, asyncdiff_last_error_rank(),
          asyncdiff_last_error());
  exit(1);
}

int main(void) {
  const int rank = getenv("RANK") == NULL ? 0 : atoi(getenv("RANK"));
  asyncdiff_fabric* fabric = NULL;
  check(asyncdiff_host_fabric_from_environment(30, 0, &fabric), "meeting");

  const int64_t shape[] = {kCount};
  const asyncdiff_tensor tensors[] = {{"int32", shape, NULL, 1}};
  const int receivers[] = {1};
  asyncdiff_channel* channel = NULL;
  check(asyncdiff_channel_make(fabric, 0, receivers, 1, tensors, 1, 2, "numbers", "auto", &channel),
        "making a channel");

  for (int n = 0; n < kBundles; ++n) {
    if (rank == 0) {
      int32_t numbers[kCount];
      for (int i = 0; i < kCount; ++i) numbers[i] = n + i;
      const void* data[] = {numbers};
      check(asyncdiff_put(channel, data, 1, n % 2, NULL), "put");
    } else {
      void* data = NULL;
      size_t nbytes = 0;
      check(asyncdiff_get(channel, 1, n % 2, NULL), "get");
      check(asyncdiff_slot(channel, 1, n % 2, 0, &data, &nbytes), "slot");
      const int32_t* numbers = data;
      for (int i = 0; i < kCount; ++i) {
        if (numbers[i] != n + i || nbytes != sizeof(int32_t) * kCount) return 2;
      }
      check(asyncdiff_release(channel, 1, n % 2, NULL), "release");
    }
  }
  check(asyncdiff_check(fabric), "check");
  check(asyncdiff_channel_free(channel), "closing the channel");
  check(asyncdiff_fabric_free(fabric), "closing the fabric");
  if (rank == 1) printf("%d bundles with asyncdiff %s\n", kBundles, asyncdiff_version());
  return 0;
}
