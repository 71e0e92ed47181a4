// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * A user program that races a device against its own process, which the
 * kernel's HMM tests hardly do. One thread lets the device read and write a
 * buffer; the other replaces pages of it, writes a mark into them and asks the
 * device what it sees. A driver that is right always sees the mark.
 *
 * gcc -O2 -static -pthread -o race race.c && ./race /dev/hmm_dmirror0 SECONDS
 */

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include "hmm_uapi.h"

#define PAGE	4096UL
#define PAGES	512UL
#define SHARED	(PAGES / 2)	/* the device writes the pages behind */

static int fd;
static char *buffer;
static volatile int stop;
static unsigned long jobs, replaced, failed, wrong;

static int request(unsigned long number, void *at, void *data, unsigned long npages)
{
	struct mgpu_hmm_request request = {
		.addr = (uintptr_t)at,
		.ptr = (uintptr_t)data,
		.npages = npages,
	};
	int ret;

	/* Busy: the pages were replaced for a second without a pause. */
	do
		ret = ioctl(fd, number, &request);
	while (ret && errno == EBUSY && !stop);
	return ret && errno != EBUSY;
}

static void *device(void *unused)
{
	char *copy = malloc(PAGES * PAGE);

	memset(copy, 0x5a, PAGES * PAGE);
	while (!stop) {
		if (request(MGPU_HMM_READ, buffer, copy, PAGES))
			failed++;
		if (request(MGPU_HMM_WRITE, buffer + SHARED * PAGE, copy,
			    PAGES - SHARED))
			failed++;
		jobs += 2;
	}
	free(copy);
	return unused;
}

/*
 * Replaces the pages one by one, each once, and marks them. What a lookup of the
 * other thread has got wrong meanwhile stays wrong until the device is asked.
 * Returns 1 if it sees something else.
 */
static int replace(unsigned int mark)
{
	static unsigned int seen[SHARED * PAGE / sizeof(int)];
	unsigned long i;
	int bad = 0;

	for (i = 0; i < SHARED; i++) {
		madvise(buffer + i * PAGE, PAGE, MADV_DONTNEED);
		*(unsigned int *)(buffer + i * PAGE) = mark;
	}
	if (request(MGPU_HMM_READ, buffer, seen, SHARED)) {
		failed++;
		return 0;
	}
	for (i = 0; i < SHARED; i++)
		bad |= seen[i * PAGE / sizeof(int)] != mark;
	return bad;
}

int main(int argc, char **argv)
{
	time_t end = time(NULL) + (argc > 2 ? atoi(argv[2]) : 10);
	pthread_t thread;

	fd = open(argc > 1 ? argv[1] : "/dev/hmm_dmirror0", O_RDWR);
	if (fd < 0) {
		perror("open");
		return 2;
	}
	buffer = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(buffer, PAGES * PAGE, MADV_NOHUGEPAGE);
	if (pthread_create(&thread, NULL, device, NULL))
		return 2;
	while (time(NULL) < end)
		wrong += replace(++replaced);
	stop = 1;
	pthread_join(thread, NULL);
	printf("race: %lu requests of the device, %lu rounds of replacing: %lu failed, %lu wrong\n",
	       jobs, replaced, failed, wrong);
	return failed || wrong;
}
