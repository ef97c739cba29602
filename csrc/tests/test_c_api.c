/* The C functions, from C: two processes that exchange bundles, and one that ends. */
#include <asyncdiff/asyncdiff.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #condition, \
              asyncdiff_last_error());                                                        \
      exit(1);                                                                                \
    }                                                                                         \
  } while (0)

enum { kCount = 1000, kBundles = 500 };

static const char kKey[] = "a secret of this test";

static int free_port(void) {
  const int s = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in address;
  socklen_t size = sizeof address;
  memset(&address, 0, sizeof address);
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  CHECK(bind(s, (struct sockaddr*)&address, sizeof address) == 0);
  CHECK(getsockname(s, (struct sockaddr*)&address, &size) == 0);
  close(s);
  return ntohs(address.sin_port);
}

static asyncdiff_channel* make(asyncdiff_fabric* fabric, int sender, int receiver) {
  const int64_t shape[] = {10, kCount / 10};
  const asyncdiff_tensor tensors[] = {{"int32", shape, NULL, 2}, {"uint8", shape, NULL, 1}};
  asyncdiff_channel* out = NULL;
  CHECK(asyncdiff_channel_make(fabric, sender, &receiver, 1, tensors, 2, 2, NULL, NULL, &out) ==
        ASYNCDIFF_OK);
  return out;
}

static void send_one(asyncdiff_channel* channel, int n) {
  int32_t numbers[kCount];
  uint8_t bytes[10];
  for (int i = 0; i < kCount; ++i) numbers[i] = n + i;
  memset(bytes, n, sizeof bytes);
  const void* data[] = {numbers, bytes};
  CHECK(asyncdiff_put(channel, data, 2, n % 2, NULL) == ASYNCDIFF_OK);
}

static void receive_one(asyncdiff_channel* channel, int rank, int n) {
  void* data = NULL;
  size_t nbytes = 0;
  CHECK(asyncdiff_wait_for(channel, rank, (uint64_t)n + 1) == ASYNCDIFF_OK); /* on one host */
  CHECK(asyncdiff_wait_for(channel, 99, 1) == ASYNCDIFF_INVALID_ARGUMENT);
  CHECK(asyncdiff_get(channel, rank, n % 2, NULL) == ASYNCDIFF_OK);
  CHECK(asyncdiff_slot(channel, rank, n % 2, 0, &data, &nbytes) == ASYNCDIFF_OK);
  CHECK(nbytes == sizeof(int32_t) * kCount);
  for (int i = 0; i < kCount; ++i) CHECK(((const int32_t*)data)[i] == n + i);
  CHECK(asyncdiff_slot(channel, rank, n % 2, 1, &data, &nbytes) == ASYNCDIFF_OK);
  CHECK(nbytes == 10 && ((const uint8_t*)data)[9] == (uint8_t)n);
  CHECK(asyncdiff_release(channel, rank, n % 2, NULL) == ASYNCDIFF_OK);
}

/* Process 1 is killed in the end; process 0 learns of it at once. */
static void run(int rank, int port) {
  asyncdiff_fabric* fabric = NULL;
  CHECK(asyncdiff_host_fabric_meet("127.0.0.1", port, rank, 2, kKey, sizeof kKey, 20, 20,
                                   &fabric) == ASYNCDIFF_OK);
  CHECK(asyncdiff_fabric_ranks(fabric) == 2);
  asyncdiff_channel* up = make(fabric, 0, 1);
  asyncdiff_channel* down = make(fabric, 1, 0);
  asyncdiff_channel* to = rank == 0 ? up : down;
  asyncdiff_channel* from = rank == 0 ? down : up;
  for (int n = 0; n < kBundles; ++n) {
    send_one(to, n);
    receive_one(from, rank, n);
  }
  CHECK(asyncdiff_check(fabric) == ASYNCDIFF_OK);
  CHECK(asyncdiff_reset(fabric, 0) == ASYNCDIFF_OK);
  if (rank == 1) raise(SIGKILL);
  CHECK(asyncdiff_get(from, 0, 0, NULL) == ASYNCDIFF_PROCESS_LOST);
  CHECK(asyncdiff_last_error_rank() == 1);
  CHECK(strstr(asyncdiff_last_error(), "process 1 (rank 1) has ended") != NULL);
  CHECK(asyncdiff_check(fabric) == ASYNCDIFF_PROCESS_LOST);
  CHECK(asyncdiff_channel_free(to) == ASYNCDIFF_PROCESS_LOST);
  CHECK(asyncdiff_fabric_free(fabric) == ASYNCDIFF_OK);
  asyncdiff_channel_free(from); /* after its fabric */
}

static void errors(void) {
  asyncdiff_fabric* fabric = NULL;
  asyncdiff_channel* channel = NULL;
  const int receivers[] = {1};
  CHECK(asyncdiff_host_fabric_make(0, 1, &fabric) == ASYNCDIFF_INVALID_ARGUMENT);
  CHECK(strstr(asyncdiff_last_error(), "at least one rank") != NULL);
  CHECK(asyncdiff_host_fabric_make(2, 0.1, NULL) == ASYNCDIFF_INVALID_ARGUMENT);
  /* Before anybody is met, and anything is made that nobody could give back. */
  CHECK(asyncdiff_host_fabric_meet("127.0.0.1", free_port(), 1, 2, "key", 3, 0.1, 0.1, NULL) ==
        ASYNCDIFF_INVALID_ARGUMENT);
  CHECK(strstr(asyncdiff_last_error(), "where the fabric goes is a null pointer") != NULL);
  CHECK(asyncdiff_check(NULL) == ASYNCDIFF_INVALID_ARGUMENT);
  CHECK(asyncdiff_host_fabric_make(2, 0.1, &fabric) == ASYNCDIFF_OK);
  CHECK(asyncdiff_channel_make(fabric, 0, receivers, 1, NULL, 1, 2, NULL, NULL, &channel) ==
        ASYNCDIFF_INVALID_ARGUMENT);
  CHECK(strstr(asyncdiff_last_error(), "the list of tensors is a null pointer") != NULL);
  CHECK(asyncdiff_channel_make(fabric, 0, receivers, 1, NULL, 1, 2, NULL, NULL, NULL) ==
        ASYNCDIFF_INVALID_ARGUMENT);
  CHECK(strstr(asyncdiff_last_error(), "where the channel goes is a null pointer") != NULL);
  channel = make(fabric, 0, 1);
  CHECK(asyncdiff_put(channel, NULL, 0, 0, NULL) == ASYNCDIFF_INVALID_ARGUMENT);
  CHECK(asyncdiff_slot(channel, 1, 0, 7, NULL, NULL) == ASYNCDIFF_INVALID_ARGUMENT);
  CHECK(asyncdiff_get(channel, 1, 1, NULL) == ASYNCDIFF_SLOT_ORDER);
  CHECK(asyncdiff_reset(fabric, 0) == ASYNCDIFF_OK);
  CHECK(asyncdiff_get(channel, 1, 0, NULL) == ASYNCDIFF_EXCHANGE_TIMEOUT);
  CHECK(asyncdiff_last_error_rank() == 0);
  CHECK(asyncdiff_reset(fabric, 0) == ASYNCDIFF_OK);
  CHECK(asyncdiff_abort(fabric, 1, "enough") == ASYNCDIFF_OK);
  CHECK(asyncdiff_check(fabric) == ASYNCDIFF_ABORTED && asyncdiff_last_error_rank() == 1);
  CHECK(asyncdiff_channel_free(channel) == ASYNCDIFF_OK);
  CHECK(asyncdiff_channel_free(NULL) == ASYNCDIFF_OK);
  CHECK(asyncdiff_fabric_free(fabric) == ASYNCDIFF_OK);
  CHECK(asyncdiff_fabric_free(NULL) == ASYNCDIFF_OK);
  CHECK(asyncdiff_host_fabric_from_environment(0.1, 0.1, &fabric) == ASYNCDIFF_INVALID_ARGUMENT);
  CHECK(strstr(asyncdiff_last_error(), "is not set") != NULL);
}

int main(void) {
  CHECK(strchr(asyncdiff_version(), '.') != NULL);
  unsetenv("RANK");
  errors();
  const int port = free_port();
  const pid_t other = fork();
  CHECK(other >= 0);
  run(other == 0 ? 1 : 0, port);
  int status = 0;
  CHECK(waitpid(other, &status, 0) == other);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  return 0;
}
