/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/*
 * What user space sees of /dev/hmm_dmirror0 and 1.
 *
 * The numbers and the layout are those of the kernel's own HMM test driver, so
 * that tools/testing/selftests/mm/hmm-tests.c runs here without a change.
 */
#ifndef MGPU_HMM_UAPI_H
#define MGPU_HMM_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* One request about the user's pages from addr on. */
struct mgpu_hmm_request {
	__u64 addr;	/* in: where the pages are */
	__u64 ptr;	/* in: where the data, or one byte a page, goes or comes from */
	__u64 npages;	/* in: how many pages; FLAGS: the flags */
	__u64 cpages;	/* out: how many pages were copied or looked at */
	__u64 faults;	/* out: how often pages had to be looked up */
};

#define MGPU_HMM_IOCTL(nr)	_IOWR('H', (nr), struct mgpu_hmm_request)

#define MGPU_HMM_READ			MGPU_HMM_IOCTL(0x00)
#define MGPU_HMM_WRITE			MGPU_HMM_IOCTL(0x01)
#define MGPU_HMM_MIGRATE_TO_DEV		MGPU_HMM_IOCTL(0x02)
#define MGPU_HMM_MIGRATE_TO_SYS		MGPU_HMM_IOCTL(0x03)
#define MGPU_HMM_SNAPSHOT		MGPU_HMM_IOCTL(0x04)
#define MGPU_HMM_EXCLUSIVE		MGPU_HMM_IOCTL(0x05)
#define MGPU_HMM_CHECK_EXCLUSIVE	MGPU_HMM_IOCTL(0x06)
#define MGPU_HMM_RELEASE		MGPU_HMM_IOCTL(0x07)
#define MGPU_HMM_FLAGS			MGPU_HMM_IOCTL(0x08)
#define MGPU_HMM_READ_UNLOCKED		MGPU_HMM_IOCTL(0x09)

/* FLAGS: the next allocation of a huge page fails. */
#define MGPU_HMM_FLAG_FAIL_ALLOC	(1ULL << 0)

/* What SNAPSHOT says of a page, in one byte. */
enum {
	MGPU_HMM_PROT_NONE		= 0x00,
	MGPU_HMM_PROT_READ		= 0x01,
	MGPU_HMM_PROT_WRITE		= 0x02,
	MGPU_HMM_PROT_PMD		= 0x04,
	MGPU_HMM_PROT_PUD		= 0x08,
	MGPU_HMM_PROT_ZERO		= 0x10,
	MGPU_HMM_PROT_DEVICE_LOCAL	= 0x20,
	MGPU_HMM_PROT_ERROR		= 0xff,
};

#endif /* MGPU_HMM_UAPI_H */
