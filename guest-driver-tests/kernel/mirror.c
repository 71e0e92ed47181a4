// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The mirror of a process: which of its pages the device may use now, and
 * under which I/O address. An entry of the shadow holds no reference to its
 * page. It stands for as long as the CPU's page table says the same, which the
 * notifier ends:
 *
 *   lookup                            notifier (unmap, migrate, exit ...)
 *   seq = read_begin
 *   hmm_range_fault
 *   lock                              lock
 *   read_retry(seq)? start again      set_seq
 *   map for DMA, store                clear the page-table entries, flush
 *   write the page-table entries      unmap for DMA, erase
 *   unlock                            unlock
 *
 * A job that gets to a cleared entry fails, and the request is looked up again.
 * Without page tables there are no entries, and in the place of the flush the
 * notifier waits for the jobs that use the range.
 *
 * INVARIANT: a page that is in a page table is mapped for DMA, and it stays so
 * until no packet uses its entry any more. When the notifier returns, the
 * device cannot reach the range.
 */

#include <linux/delay.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "mgpu.h"

/* What a notifier does about the jobs that use its pages. */
enum mgpu_jobs {
	MGPU_JOBS_LOOK,
	MGPU_JOBS_WAIT,
	/* They go on, and fail when they get to a page that is gone. */
	MGPU_JOBS_OVERTAKE,
};

/* Whether a job uses pages among [first, last]. */
static bool mgpu_mirror_jobs(struct mgpu_mirror *mirror, unsigned long first,
			     unsigned long last, enum mgpu_jobs what)
{
	struct mgpu_job *job;
	bool found = false;

	list_for_each_entry(job, &mirror->jobs, node) {
		if (job->first > last || job->end <= first)
			continue;
		found = true;
		if (what == MGPU_JOBS_WAIT)
			wait_for_completion(&job->submit->done);
		else if (what == MGPU_JOBS_OVERTAKE)
			WRITE_ONCE(job->overtaken, true);
	}
	return found;
}

/* Unmaps pages [first, last] for DMA, and erases them from the shadow. */
static void mgpu_mirror_drop(struct mgpu_mirror *mirror, unsigned long first,
			     unsigned long last)
{
	struct mgpu_chunk *chunk;
	unsigned long index;

	xa_for_each_range(&mirror->shadow, index, chunk, first, last)
		mgpu_chunk_drop(mirror, chunk, first, last);
}

/* Clears the page-table entries of pages [first, last]. */
static void mgpu_mirror_clear(struct mgpu_mirror *mirror, unsigned long first,
			      unsigned long last)
{
	struct mgpu_chunk *chunk;
	unsigned long index;

	xa_for_each_range(&mirror->shadow, index, chunk, first, last)
		mgpu_chunk_clear(mirror, chunk, index);
}

static void mgpu_mirror_flush(struct mgpu_mirror *mirror, unsigned long first,
			      unsigned long last)
{
	bool leaves = !mgpu_tables_unlinked(&mirror->as) ||
		      mgpu_bug(MGPU_BUG_LEAVES_FOR_TABLE);

	if (mgpu_bug(MGPU_BUG_NO_FLUSH))
		return;
	if (mgpu_bug(MGPU_BUG_SHORT_FLUSH) && first == last--)
		return;
	mgpu_as_flush(&mirror->as, first, last, leaves);
}

/*
 * Takes pages from a device that finds them by page tables. Jobs are not waited
 * for; behind the flush none of them uses the pages any more.
 */
static void mgpu_mirror_forget_mapped(struct mgpu_mirror *mirror,
				      unsigned long first, unsigned long last)
{
	mgpu_mirror_jobs(mirror, first, last, MGPU_JOBS_OVERTAKE);
	if (mgpu_bug(MGPU_BUG_FLUSH_BEFORE_ZAP)) {
		mgpu_mirror_flush(mirror, first, last);
		/* Widens the window in which the old entry is cached again. */
		usleep_range(200, 400);
	}
	mgpu_mirror_clear(mirror, first, last);
	if (mgpu_bug(MGPU_BUG_UNMAP_BEFORE_FLUSH))
		mgpu_mirror_drop(mirror, first, last);
	if (!mgpu_bug(MGPU_BUG_FLUSH_BEFORE_ZAP))
		mgpu_mirror_flush(mirror, first, last);
	mgpu_mirror_drop(mirror, first, last);
	mgpu_tables_free_unlinked(&mirror->as);
}

static bool mgpu_mirror_is_empty(struct mgpu_mirror *mirror,
				 unsigned long first, unsigned long last)
{
	return !xa_find(&mirror->shadow, &first, last, XA_PRESENT);
}

/* Takes pages [first, last] from the device. */
void mgpu_mirror_forget(struct mgpu_mirror *mirror, unsigned long first,
			unsigned long last)
{
	lockdep_assert_held(&mirror->lock);
	if (mirror->unit->device->tables) {
		if (!mgpu_mirror_is_empty(mirror, first, last))
			mgpu_mirror_forget_mapped(mirror, first, last);
		return;
	}
	if (!mgpu_bug(MGPU_BUG_UNMAP_BEFORE_FENCE))
		mgpu_mirror_jobs(mirror, first, last, MGPU_JOBS_WAIT);
	mgpu_mirror_drop(mirror, first, last);
}

/* Whether pages [first, last] can be taken away without waiting for the device. */
static bool mgpu_mirror_is_idle(struct mgpu_mirror *mirror,
				unsigned long first, unsigned long last)
{
	if (mirror->unit->device->tables)
		return mgpu_mirror_is_empty(mirror, first, last);
	return !mgpu_mirror_jobs(mirror, first, last, MGPU_JOBS_LOOK);
}

/* Bug: where the kernel write-protects pages, their entries change without a flush. */
static bool mgpu_mirror_protect(struct mgpu_mirror *mirror,
				const struct mmu_notifier_range *range,
				unsigned long first, unsigned long last)
{
	struct mgpu_chunk *chunk;
	unsigned long index;

	if (!mgpu_bug(MGPU_BUG_PROTECT_WITHOUT_FLUSH) ||
	    !mirror->unit->device->tables ||
	    (range->event != MMU_NOTIFY_PROTECTION_VMA &&
	     range->event != MMU_NOTIFY_PROTECTION_PAGE))
		return false;
	xa_for_each_range(&mirror->shadow, index, chunk, first, last)
		mgpu_chunk_protect(mirror, chunk, index);
	return true;
}

static bool mgpu_mirror_invalidate(struct mmu_interval_notifier *notifier,
				   const struct mmu_notifier_range *range,
				   unsigned long sequence)
{
	struct mgpu_mirror *mirror =
		container_of(notifier, struct mgpu_mirror, notifier);
	unsigned long first = range->start >> PAGE_SHIFT;
	unsigned long last = (range->end - 1) >> PAGE_SHIFT;
	bool may_wait = mmu_notifier_range_blockable(range);

	if (may_wait)
		mutex_lock(&mirror->lock);
	else if (!mutex_trylock(&mirror->lock))
		return false;
	if (!may_wait && !mgpu_mirror_is_idle(mirror, first, last)) {
		mutex_unlock(&mirror->lock);
		return false;
	}
	/*
	 * Pages become exclusive to the unit under its own lookup, which must
	 * not be told to start again by what it did itself.
	 */
	if (!mgpu_becomes_exclusive(range, mirror->unit))
		mmu_interval_set_seq(notifier, sequence);
	if (!mgpu_bug(MGPU_BUG_FORGET_NOTIFIER) &&
	    !mgpu_mirror_protect(mirror, range, first, last))
		mgpu_mirror_forget(mirror, first, last);
	mutex_unlock(&mirror->lock);
	return true;
}

static const struct mmu_interval_notifier_ops mgpu_mirror_ops = {
	.invalidate = mgpu_mirror_invalidate,
};

static int mgpu_range_fault(struct hmm_range *range, enum mgpu_lookup lookup)
{
	struct mm_struct *mm = range->notifier->mm;
	int ret;

	if (lookup == MGPU_LOOKUP_READ_UNLOCKED)
		return hmm_range_fault_unlocked_timeout(range,
			msecs_to_jiffies(HMM_RANGE_DEFAULT_TIMEOUT));
	range->notifier_seq = mmu_interval_read_begin(range->notifier);
	mmap_read_lock(mm);
	ret = hmm_range_fault(range);
	mmap_read_unlock(mm);
	return ret;
}

static int mgpu_store_range(struct mgpu_mirror *mirror,
			    struct mgpu_chunk *chunk,
			    const struct hmm_range *range,
			    enum mgpu_lookup lookup)
{
	unsigned long first = range->start >> PAGE_SHIFT;
	unsigned long i, count = (range->end - range->start) >> PAGE_SHIFT;
	int ret = 0, synced;

	for (i = 0; i < count && !ret; i++) {
		unsigned long pfn = range->hmm_pfns[i];
		struct page *page = hmm_pfn_to_page(pfn);

		if (!(pfn & HMM_PFN_VALID))
			continue;
		if (lookup == MGPU_LOOKUP_LOCAL &&
		    !mgpu_local_owns(mirror->unit, page))
			continue;
		ret = mgpu_chunk_store(mirror, chunk, first + i, page,
				       pfn & HMM_PFN_WRITE ? MGPU_ENTRY_WRITE : 0);
	}
	/* What was stored before an error can be used by others, too. */
	synced = mgpu_chunk_sync(mirror, chunk);
	if (mgpu_bug(MGPU_BUG_SHORT_MAPPING))
		mgpu_chunk_shorten(mirror, chunk, count - 1);
	return ret ?: synced;
}

/* Looks up one window of pages, until what was found still holds. */
static int mgpu_fault_window(struct mgpu_mirror *mirror,
			     struct mgpu_chunk *chunk, struct hmm_range *range,
			     enum mgpu_lookup lookup)
{
	unsigned long deadline =
		jiffies + msecs_to_jiffies(HMM_RANGE_DEFAULT_TIMEOUT);
	int ret;

	for (;;) {
		if (fatal_signal_pending(current))
			return -EINTR;
		if (time_after(jiffies, deadline))
			return -EBUSY;
		ret = mgpu_range_fault(range, lookup);
		if (ret == -EBUSY)
			continue;
		if (ret)
			return ret;
		/* Widens the window that the sequence closes, so that the bug shows. */
		if (mgpu_bug(MGPU_BUG_NO_READ_RETRY))
			usleep_range(2000, 3000);
		mutex_lock(&mirror->lock);
		if (!mmu_interval_read_retry(range->notifier,
					     range->notifier_seq) ||
		    mgpu_bug(MGPU_BUG_NO_READ_RETRY))
			break;
		mutex_unlock(&mirror->lock);
	}
	ret = mgpu_store_range(mirror, chunk, range, lookup);
	mutex_unlock(&mirror->lock);
	return ret;
}

static unsigned long mgpu_lookup_flags(enum mgpu_lookup lookup)
{
	if (lookup == MGPU_LOOKUP_LOCAL)
		return 0;
	if (lookup == MGPU_LOOKUP_WRITE && !mgpu_bug(MGPU_BUG_NO_REQ_WRITE))
		return HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE;
	return HMM_PFN_REQ_FAULT;
}

/* Looks up pages [start, end) of the process, and lets the device use them. */
int mgpu_mirror_fault(struct mgpu_mirror *mirror, unsigned long start,
		      unsigned long end, enum mgpu_lookup lookup)
{
	struct hmm_range range = {
		.notifier = &mirror->notifier,
		.default_flags = mgpu_lookup_flags(lookup),
		.dev_private_owner = mirror->unit,
	};
	struct mgpu_chunk *chunk;
	unsigned long count;
	int ret = 0;

	range.hmm_pfns = kvcalloc(MGPU_WINDOW_PAGES, sizeof(*range.hmm_pfns),
				  GFP_KERNEL);
	if (!range.hmm_pfns)
		return -ENOMEM;
	for (; start < end && !ret; start = range.end) {
		range.start = start;
		range.end = min(end, start + MGPU_WINDOW_BYTES);
		count = (range.end - range.start) >> PAGE_SHIFT;
		chunk = mgpu_chunk_alloc(mirror, start >> PAGE_SHIFT, count);
		if (!chunk) {
			ret = -ENOMEM;
			break;
		}
		ret = mgpu_fault_window(mirror, chunk, &range, lookup);
		mgpu_chunk_close(mirror, chunk);
	}
	kvfree(range.hmm_pfns);
	return ret;
}

struct mgpu_mirror *mgpu_mirror_open(struct mgpu_unit *unit)
{
	struct mgpu_device *device = unit->device;
	struct mgpu_mirror *mirror;
	int ret;

	mirror = kzalloc(sizeof(*mirror), GFP_KERNEL);
	if (!mirror)
		return ERR_PTR(-ENOMEM);
	mirror->unit = unit;
	mutex_init(&mirror->lock);
	xa_init(&mirror->shadow);
	INIT_LIST_HEAD(&mirror->jobs);
	ret = device->tables ? mgpu_as_create(&mirror->as, unit) : 0;
	if (ret)
		goto free;
	ret = mmu_interval_notifier_insert(&mirror->notifier, current->mm, 0,
					   ULONG_MAX & PAGE_MASK,
					   &mgpu_mirror_ops);
	if (ret)
		goto destroy;
	mutex_lock(&device->mirrors_lock);
	list_add(&mirror->node, &device->mirrors);
	mutex_unlock(&device->mirrors_lock);
	return mirror;

destroy:
	mgpu_as_end(&mirror->as);
	mgpu_as_destroy(&mirror->as);
free:
	kfree(mirror);
	return ERR_PTR(ret);
}

/* A job that a seeded bug has left in flight ends before what it names. */
static void mgpu_mirror_end_left_job(struct mgpu_mirror *mirror)
{
	struct mgpu_unit *unit = mirror->unit;

	mutex_lock(&unit->engine);
	if (unit->job.left && unit->job.as == &mirror->as)
		mgpu_job_begin(unit);
	mutex_unlock(&unit->engine);
}

/*
 * Takes everything from the device: for good, no request runs any more. Called
 * again, it finds nothing to do.
 */
void mgpu_mirror_end(struct mgpu_mirror *mirror)
{
	if (mirror->as.id)
		mgpu_mirror_end_left_job(mirror);
	mgpu_as_end(&mirror->as);
	mutex_lock(&mirror->lock);
	mgpu_mirror_forget(mirror, 0, ULONG_MAX);
	mgpu_as_destroy(&mirror->as);
	mutex_unlock(&mirror->lock);
}

void mgpu_mirror_close(struct mgpu_mirror *mirror)
{
	struct mgpu_device *device = mirror->unit->device;

	/* After this no notifier runs, and no request of the file does. */
	mmu_interval_notifier_remove(&mirror->notifier);
	mutex_lock(&device->mirrors_lock);
	list_del(&mirror->node);
	mgpu_mirror_end(mirror);
	mutex_unlock(&device->mirrors_lock);
	xa_destroy(&mirror->shadow);
	kfree(mirror);
}
