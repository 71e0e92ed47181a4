// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * A user program that races a device against its own process, which the
 * kernel's HMM tests hardly do. One thread lets the device read and write a
 * buffer; the other takes pages of it away from under the jobs. A driver that
 * is right never fails a request, and its device
 *
 *   - sees the mark in every page that has been replaced, when asked after it,
 *   - writes to no page between an mprotect() and the one that takes it back.
 *
 * The buffer is what one table of level 0 maps, and is dropped as a whole once
 * a round: then a driver with page tables has a table without entries.
 *
 * gcc -O2 -static -pthread -o race race.c && ./race /dev/hmm_dmirror0 SECONDS
 */

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "hmm_uapi.h"

#define PAGE	4096UL
#define PAGES	512UL
#define BYTES	(PAGES * PAGE)
#define SHARED	(PAGES / 2)	/* the device writes the pages behind */
#define WRITTEN	(PAGES - SHARED)

static int fd;
static char *buffer;
static volatile int stop;
/* Odd: the pages that the device writes are write-protected. */
static volatile unsigned long protections;
static volatile unsigned long jobs;
/* The device is at it. */
static volatile int writing;
static unsigned long replaced, failed, stale, written;

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

/* Lets the device write other bytes than before. Fails where it must not write. */
static void device_writes(char *copy)
{
	unsigned long before = protections;

	memset(copy, (int)(jobs & 0xff), WRITTEN * PAGE);
	writing = 1;
	if (request(MGPU_HMM_WRITE, buffer + SHARED * PAGE, copy, WRITTEN) &&
	    !(before & 1) && before == protections)
		__atomic_add_fetch(&failed, 1, __ATOMIC_RELAXED);
	writing = 0;
}

static void *device(void *unused)
{
	char *copy = malloc(BYTES);

	while (!stop) {
		if (request(MGPU_HMM_READ, buffer, copy, PAGES))
			__atomic_add_fetch(&failed, 1, __ATOMIC_RELAXED);
		device_writes(copy);
		__atomic_add_fetch(&jobs, 2, __ATOMIC_SEQ_CST);
	}
	free(copy);
	return unused;
}

/*
 * Replaces the pages, first all at once, then one by one, and marks them. What a
 * lookup of the other thread has got wrong meanwhile stays wrong until the
 * device is asked. Returns 1 if it sees something else.
 */
static int replace(unsigned int mark)
{
	static unsigned int seen[SHARED * PAGE / sizeof(int)];
	unsigned long i;
	int bad = 0;

	madvise(buffer, BYTES, MADV_DONTNEED);
	for (i = 0; i < SHARED; i++) {
		madvise(buffer + i * PAGE, PAGE, MADV_DONTNEED);
		*(unsigned int *)(buffer + i * PAGE) = mark;
	}
	if (request(MGPU_HMM_READ, buffer, seen, SHARED)) {
		__atomic_add_fetch(&failed, 1, __ATOMIC_RELAXED);
		return 0;
	}
	for (i = 0; i < SHARED; i++)
		bad |= seen[i * PAGE / sizeof(int)] != mark;
	return bad;
}

/* Waits until the device writes what it has written before, and is somewhere in it. */
static void wait_for_writes(void)
{
	unsigned long before = jobs;

	while (jobs < before + 4 || !writing)
		sched_yield();
	usleep(rand() % 3000);
}

/*
 * Write-protects what the device writes, until it has come to the end of what it
 * was at. Returns 1 if bytes have changed.
 */
static int protect(void)
{
	volatile char *behind = buffer + SHARED * PAGE;
	unsigned long before, i;
	char seen[WRITTEN];
	int bad = 0;

	wait_for_writes();
	__atomic_add_fetch(&protections, 1, __ATOMIC_SEQ_CST);
	mprotect((void *)behind, WRITTEN * PAGE, PROT_READ);
	/* A byte of each page, the ones that are written last first. */
	for (i = WRITTEN; i-- > 0;)
		seen[i] = behind[i * PAGE];
	before = jobs;
	while (jobs == before)
		sched_yield();
	for (i = 0; i < WRITTEN; i++)
		bad |= seen[i] != behind[i * PAGE];
	mprotect((void *)behind, WRITTEN * PAGE, PROT_READ | PROT_WRITE);
	__atomic_add_fetch(&protections, 1, __ATOMIC_SEQ_CST);
	return bad;
}

/* An aligned buffer, without huge pages. */
static char *map_buffer(void)
{
	char *map = mmap(NULL, 2 * BYTES, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	map += BYTES - (uintptr_t)map % BYTES;
	madvise(map, BYTES, MADV_NOHUGEPAGE);
	return map;
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
	buffer = map_buffer();
	if (pthread_create(&thread, NULL, device, NULL))
		return 2;
	while (time(NULL) < end) {
		stale += replace(++replaced);
		written += protect();
	}
	stop = 1;
	pthread_join(thread, NULL);
	printf("race: %lu requests of the device, %lu rounds: %lu requests failed, %lu rounds saw old pages, %lu wrote to protected ones\n",
	       jobs, replaced, failed, stale, written);
	return failed || stale || written;
}
