// Copyright: (c) 2026, The ctsync authors
// GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later
//
// Real TCP connections for the benchmark: a short request, a short answer, close.
//
//   connections serve PORT...
//       Answers on every local address.  Prints "ready"; ends when it is killed.
//   connections open SOURCES/BITS SERVERS/BITS RATE PARALLEL HOLD_MS WARMUP_S SECONDS SEED PORT...
//       RATE connections a second with random (Poisson) arrivals, or, with RATE 0, PARALLEL at once as fast as they go.
//       Client address and port, server address and port are random for each connection; the client keeps it open for
//       HOLD_MS after the answer and closes first.  After WARMUP_S it prints "begin", SECONDS later one line of JSON
//       about the time between, and ends.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { REQUEST = 100, ANSWER = 1000, EVENTS = 512, MAX_FD = 1 << 18, TRIES = 20, BURST = 50 };

static const double GIVE_UP_S = 5.0, LATE_S = 0.5;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void many_files(void) {
    struct rlimit limit = {MAX_FD, MAX_FD};
    if (setrlimit(RLIMIT_NOFILE, &limit)) {
        getrlimit(RLIMIT_NOFILE, &limit);
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static void watch(int epoll, int operation, int fd, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    if (epoll_ctl(epoll, operation, fd, &event))
        die("epoll_ctl");
}

// --- server ---

static uint16_t received[MAX_FD];

static void serve(int count, char **ports) {
    int epoll = epoll_create1(0), on = 1, listeners[64], listening = 0;
    char buffer[4096], answer[ANSWER];
    memset(answer, 'a', sizeof answer);
    for (int k = 0; k < count && k < 64; k++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(ports[k]))};
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 65535))
            die("listen");
        watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN);
        listeners[listening++] = fd;
    }
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd, is_listener = 0;
            for (int k = 0; k < listening; k++)
                is_listener |= listeners[k] == fd;
            if (is_listener) {
                int peer;
                while ((peer = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (peer >= MAX_FD) {
                        close(peer);
                        continue;
                    }
                    received[peer] = 0;
                    watch(epoll, EPOLL_CTL_ADD, peer, EPOLLIN);
                }
                continue;
            }
            ssize_t got = recv(fd, buffer, sizeof buffer, 0);
            if (got <= 0) {
                if (got < 0 && errno == EAGAIN)
                    continue;
                close(fd);
                continue;
            }
            received[fd] += (uint16_t)got;
            if (received[fd] >= REQUEST) {
                received[fd] = 0;
                if (send(fd, answer, sizeof answer, MSG_NOSIGNAL) < 0)
                    close(fd);
            }
        }
    }
}

// --- client ---

static uint64_t state;

static uint64_t chance(void) { // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

struct range {
    uint32_t base, size;
};

static struct range range_of(char *text) {
    char *slash = strchr(text, '/');
    if (!slash) {
        fprintf(stderr, "%s: write ADDRESS/BITS\n", text);
        exit(2);
    }
    *slash = 0;
    struct range range = {ntohl(inet_addr(text)), 1u << (32 - atoi(slash + 1))};
    return range;
}

static uint32_t pick(struct range range) { // neither the first nor the last address
    return htonl(range.base + 1 + (uint32_t)(chance() % (range.size - 2)));
}

enum { FREE, CONNECTING, WAITING, HOLDING };
static uint8_t phase[MAX_FD];
static uint16_t answered[MAX_FD];
static double since[MAX_FD]; // connecting: begun; holding: to be closed

static struct {
    long started, completed, failed, skipped;
} counted;

static int queue[MAX_FD], queue_head, queue_tail; // held connections, in the order in which they close

static int open_one(int epoll, struct range sources, struct range servers, int ports, const uint16_t *port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1, tries;
    if (fd < 0 || fd >= MAX_FD) {
        if (fd >= 0)
            close(fd);
        counted.failed++;
        return -1;
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    for (tries = 0; tries < TRIES; tries++) {
        struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = pick(sources)};
        own.sin_port = htons((uint16_t)(1024 + chance() % 64512));
        if (!bind(fd, (struct sockaddr *)&own, sizeof own))
            break;
    }
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_addr.s_addr = pick(servers)};
    server.sin_port = htons(port[chance() % (unsigned)ports]);
    if (tries == TRIES || (connect(fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS)) {
        counted.failed++;
        close(fd);
        return -1;
    }
    counted.started++;
    phase[fd] = CONNECTING;
    answered[fd] = 0;
    since[fd] = now_s();
    watch(epoll, EPOLL_CTL_ADD, fd, EPOLLOUT);
    return fd;
}

static void end_one(int fd, int good) {
    if (good)
        counted.completed++;
    else
        counted.failed++;
    phase[fd] = FREE;
    close(fd);
}

static int open_many(int count, char **word) {
    if (count < 9) {
        fprintf(stderr, "too few arguments\n");
        return 2;
    }
    struct range sources = range_of(word[0]), servers = range_of(word[1]);
    double rate = atof(word[2]), hold = atof(word[4]) / 1000, warmup = atof(word[5]), seconds = atof(word[6]);
    int parallel = atoi(word[3]), ports = 0, alive = 0, measuring = 0;
    uint16_t port[64];
    state = strtoull(word[7], NULL, 10);
    for (int k = 8; k < count && ports < 64; k++)
        port[ports++] = (uint16_t)atoi(word[k]);
    char request[REQUEST], buffer[4096];
    memset(request, 'r', sizeof request);
    int epoll = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    watch(epoll, EPOLL_CTL_ADD, timer, EPOLLIN);
    double began = now_s(), next = began, swept = began, begin_at = 0;
    for (;;) {
        double now = now_s();
        if (!measuring && now >= began + warmup) {
            measuring = 1;
            begin_at = now;
            memset(&counted, 0, sizeof counted);
            printf("begin\n");
            fflush(stdout);
        }
        if (measuring && now >= begin_at + seconds) {
            printf("{\"started\": %ld, \"completed\": %ld, \"failed\": %ld, \"seconds\": %.6f, \"open\": %d, "
                   "\"skipped\": %ld}\n",
                   counted.started, counted.completed, counted.failed, now - begin_at, alive, counted.skipped);
            return 0;
        }
        while (queue_head != queue_tail && since[queue[queue_head]] <= now) {
            end_one(queue[queue_head], 1);
            queue_head = (queue_head + 1) % MAX_FD;
            alive--;
        }
        if (rate > 0) {
            if (next < now - LATE_S) { // kept from running: what was due is not made up for in one burst
                counted.skipped += (long)((now - next) * rate);
                next = now;
            }
            for (int k = 0; next <= now && k < BURST; k++) {
                alive += open_one(epoll, sources, servers, ports, port) >= 0;
                next += -log(1.0 - (double)(chance() >> 11) / 9007199254740992.0) / rate;
            }
        } else {
            for (int k = 0; alive < parallel && k < parallel; k++)
                alive += open_one(epoll, sources, servers, ports, port) >= 0;
        }
        if (now > swept + 1) { // connections that hang
            swept = now;
            for (int fd = 0; fd < MAX_FD; fd++)
                if ((phase[fd] == CONNECTING || phase[fd] == WAITING) && since[fd] < now - GIVE_UP_S) {
                    end_one(fd, 0);
                    alive--;
                }
        }
        double wake = now + 0.05;
        if (rate > 0 && next < wake)
            wake = next;
        if (queue_head != queue_tail && since[queue[queue_head]] < wake)
            wake = since[queue[queue_head]];
        struct itimerspec at = {.it_value = {(time_t)wake, (long)((wake - (double)(time_t)wake) * 1e9)}};
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll, events, EVENTS, 100);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == timer) {
                uint64_t ticks;
                (void)!read(timer, &ticks, sizeof ticks);
            } else if (phase[fd] == CONNECTING) {
                int error = 0;
                socklen_t length = sizeof error;
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
                if (error || send(fd, request, sizeof request, MSG_NOSIGNAL) != sizeof request) {
                    end_one(fd, 0);
                    alive--;
                } else {
                    phase[fd] = WAITING;
                    watch(epoll, EPOLL_CTL_MOD, fd, EPOLLIN);
                }
            } else if (phase[fd] == WAITING) {
                ssize_t got = recv(fd, buffer, sizeof buffer, 0);
                if (got > 0)
                    answered[fd] += (uint16_t)got;
                if (got <= 0 && errno != EAGAIN) {
                    end_one(fd, 0);
                    alive--;
                } else if (answered[fd] >= ANSWER) {
                    if (hold > 0) {
                        phase[fd] = HOLDING;
                        since[fd] = now_s() + hold;
                        watch(epoll, EPOLL_CTL_MOD, fd, 0);
                        queue[queue_tail] = fd;
                        queue_tail = (queue_tail + 1) % MAX_FD;
                    } else {
                        end_one(fd, 1);
                        alive--;
                    }
                }
            }
        }
    }
}

int main(int argc, char **argv) {
    many_files();
    if (argc > 2 && !strcmp(argv[1], "serve"))
        serve(argc - 2, argv + 2);
    if (argc > 2 && !strcmp(argv[1], "open"))
        return open_many(argc - 2, argv + 2);
    fprintf(stderr, "connections serve PORT... | open SOURCES SERVERS RATE PARALLEL HOLD_MS WARMUP_S SECONDS SEED PORT...\n");
    return 2;
}
