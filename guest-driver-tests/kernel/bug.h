/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/*
 * Bugs of a driver that the parameter bug=NAME seeds. Each stands where a real
 * driver would have it; README.md says what finds it.
 */
#ifndef MGPU_BUG_H
#define MGPU_BUG_H

#include <linux/types.h>

#define MGPU_BUGS(bug) \
	bug(NONE, "none") \
	bug(FORGET_NOTIFIER, "forget-notifier") \
	bug(NO_READ_RETRY, "no-read-retry") \
	bug(NO_REQ_WRITE, "no-req-write") \
	bug(UNMAP_BEFORE_FENCE, "unmap-before-fence") \
	bug(UNMAP_AT_SUBMIT, "unmap-at-submit") \
	bug(WRONG_DIRECTION, "wrong-direction") \
	bug(SHORT_MAPPING, "short-mapping") \
	bug(FENCE_NOT_AWAITED, "fence-not-awaited") \
	bug(LEAVE_ON_SIGNAL, "leave-on-signal") \
	bug(LEAK_MAPPING, "leak-mapping") \
	bug(KEEP_BACKING, "keep-backing") \
	bug(MIGRATE_WITHOUT_COPY, "migrate-without-copy") \
	bug(NO_FLUSH, "no-flush") \
	bug(SHORT_FLUSH, "short-flush") \
	bug(FLUSH_NOT_AWAITED, "flush-not-awaited") \
	bug(UNMAP_BEFORE_FLUSH, "unmap-before-flush") \
	bug(FLUSH_BEFORE_ZAP, "flush-before-zap") \
	bug(KEEP_ENTRY, "keep-entry") \
	bug(FREE_TABLE_EARLY, "free-table-early") \
	bug(LEAVES_FOR_TABLE, "leaves-for-table") \
	bug(PROTECT_WITHOUT_FLUSH, "protect-without-flush")

#define MGPU_BUG_ENUM(name, text)	MGPU_BUG_##name,
enum mgpu_bug {
	MGPU_BUGS(MGPU_BUG_ENUM)
};

extern enum mgpu_bug mgpu_seeded_bug;

static inline bool mgpu_bug(enum mgpu_bug bug)
{
	return mgpu_seeded_bug == bug;
}

#endif /* MGPU_BUG_H */
