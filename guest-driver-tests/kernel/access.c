// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * What the device does with mirrored pages: copy them, one job a window; and
 * what it is told of them: a snapshot, exclusive access.
 */

#include <linux/mmu_context.h>
#include <linux/pagemap.h>
#include <linux/slab.h>

#include "mgpu.h"

static bool mgpu_entry_allows(u8 flags, bool write)
{
	return flags & MGPU_ENTRY_PRESENT &&
	       (!write || flags & MGPU_ENTRY_WRITE ||
		mgpu_bug(MGPU_BUG_NO_REQ_WRITE));
}

/* Adds the pages from @first on to the job, up to the first that is missing. */
static unsigned long mgpu_job_collect(struct mgpu_job *job,
				      struct mgpu_mirror *mirror,
				      unsigned long first, unsigned long count,
				      bool write)
{
	unsigned long i;

	for (i = 0; i < count; i++) {
		enum mgpu_space space = MGPU_SPACE_WINDOW;
		u64 staging = i << PAGE_SHIFT, at;
		dma_addr_t address;
		struct page *page;
		u8 flags;

		flags = mgpu_mirror_entry(mirror, first + i, &page, &address);
		if (!mgpu_entry_allows(flags, write))
			break;
		if (flags & MGPU_ENTRY_LOCAL) {
			space = MGPU_SPACE_LOCAL;
			at = mgpu_local_offset(mirror->unit, page);
		} else {
			at = mgpu_job_add_page(job, address);
		}
		if (write)
			mgpu_job_copy(job, MGPU_SPACE_STAGING, staging, space, at);
		else
			mgpu_job_copy(job, space, at, MGPU_SPACE_STAGING, staging);
	}
	return i;
}

/* The same by page tables: the job names a range of the process's addresses. */
static unsigned long mgpu_job_collect_mapped(struct mgpu_job *job,
					     struct mgpu_mirror *mirror,
					     unsigned long first,
					     unsigned long count, bool write)
{
	dma_addr_t address;
	struct page *page;
	unsigned long i;

	for (i = 0; i < count; i++)
		if (!mgpu_entry_allows(mgpu_mirror_entry(mirror, first + i,
							 &page, &address),
				       write))
			break;
	if (i)
		mgpu_job_copy_mapped(job, &mirror->as, first, i, write);
	return i;
}

/* Submits the copy of what is there. From here on a notifier finds the job. */
static int mgpu_mirror_submit(struct mgpu_mirror *mirror, struct mgpu_job *job,
			      unsigned long first, unsigned long *count,
			      bool write)
{
	int ret = 0;

	mutex_lock(&mirror->lock);
	*count = mirror->unit->device->tables ?
		mgpu_job_collect_mapped(job, mirror, first, *count, write) :
		mgpu_job_collect(job, mirror, first, *count, write);
	job->first = first;
	job->end = first + *count;
	if (*count) {
		ret = mgpu_job_submit(job);
		if (!mgpu_bug(MGPU_BUG_UNMAP_AT_SUBMIT))
			list_add(&job->node, &mirror->jobs);
		else
			mgpu_mirror_forget(mirror, first, first + *count - 1);
	}
	mutex_unlock(&mirror->lock);
	return ret;
}

static int mgpu_mirror_finish(struct mgpu_mirror *mirror, struct mgpu_job *job,
			      int result)
{
	if (!result && mgpu_bug(MGPU_BUG_LEAVE_ON_SIGNAL))
		job->left = wait_for_completion_killable(&job->submit->done);
	if (!job->left)
		result = result ?: mgpu_job_wait(job);
	mutex_lock(&mirror->lock);
	list_del_init(&job->node);
	mutex_unlock(&mirror->lock);
	if (job->left)
		return -EINTR;
	return mgpu_job_end(job, result);
}

/*
 * Copies up to a window of pages between the process and @buffer, by the
 * device. Returns -ENOENT if it came to a page that the device may not use, and
 * -EAGAIN if one was taken away under the job.
 */
int mgpu_mirror_copy(struct mgpu_mirror *mirror, unsigned long start,
		     unsigned long npages, void *buffer, bool write,
		     unsigned long *copied)
{
	struct mgpu_unit *unit = mirror->unit;
	unsigned long count = npages;
	struct mgpu_job *job;
	int ret;

	mutex_lock(&unit->engine);
	job = mgpu_job_begin(unit);
	if (write)
		memcpy(unit->staging.cpu, buffer, npages << PAGE_SHIFT);
	ret = mgpu_mirror_submit(mirror, job, start >> PAGE_SHIFT, &count, write);
	if (count) {
		if (mgpu_bug(MGPU_BUG_FENCE_NOT_AWAITED) && !write)
			memcpy(buffer, unit->staging.cpu, count << PAGE_SHIFT);
		ret = mgpu_mirror_finish(mirror, job, ret);
	}
	if (!ret && !write && !mgpu_bug(MGPU_BUG_FENCE_NOT_AWAITED))
		memcpy(buffer, unit->staging.cpu, count << PAGE_SHIFT);
	mutex_unlock(&unit->engine);
	if (ret)
		return ret;
	*copied = count;
	return count < npages ? -ENOENT : 0;
}

static u8 mgpu_permission(struct mgpu_unit *unit, unsigned long pfn)
{
	unsigned int order = hmm_pfn_to_map_order(pfn) + PAGE_SHIFT;
	struct page *page = hmm_pfn_to_page(pfn);
	u8 permission;

	if (pfn & HMM_PFN_ERROR)
		return MGPU_HMM_PROT_ERROR;
	if (!(pfn & HMM_PFN_VALID))
		return MGPU_HMM_PROT_NONE;
	permission = pfn & HMM_PFN_WRITE ? MGPU_HMM_PROT_WRITE :
					   MGPU_HMM_PROT_READ;
	if (mgpu_local_owns(unit, page))
		permission |= MGPU_HMM_PROT_DEVICE_LOCAL;
	else if (is_zero_pfn(page_to_pfn(page)))
		permission |= MGPU_HMM_PROT_ZERO;
	if (order == PMD_SHIFT)
		permission |= MGPU_HMM_PROT_PMD;
	else if (order == PUD_SHIFT)
		permission |= MGPU_HMM_PROT_PUD;
	return permission;
}

/* One byte for each page of a window, about the CPU's page table as it is. */
int mgpu_mirror_snapshot(struct mgpu_mirror *mirror, unsigned long start,
			 unsigned long npages, u8 *permissions)
{
	struct mm_struct *mm = mirror->notifier.mm;
	struct hmm_range range = {
		.notifier = &mirror->notifier,
		.start = start,
		.end = start + (npages << PAGE_SHIFT),
		.dev_private_owner = mirror->unit,
	};
	unsigned long i;
	int ret;

	range.hmm_pfns = kvcalloc(npages, sizeof(*range.hmm_pfns), GFP_KERNEL);
	if (!range.hmm_pfns)
		return -ENOMEM;
	do {
		range.notifier_seq = mmu_interval_read_begin(range.notifier);
		mmap_read_lock(mm);
		ret = hmm_range_fault(&range);
		mmap_read_unlock(mm);
	} while (ret == -EBUSY && !fatal_signal_pending(current));
	for (i = 0; i < npages && !ret; i++)
		permissions[i] = mgpu_permission(mirror->unit,
						 range.hmm_pfns[i]);
	kvfree(range.hmm_pfns);
	return ret;
}

#ifdef MGPU_HAVE_EXCLUSIVE
/* Stores an exclusive page unless a notifier has come in between. */
static int mgpu_store_exclusive(struct mgpu_mirror *mirror,
				struct mgpu_chunk *chunk, unsigned long index,
				struct page *page, unsigned long sequence)
{
	int ret = -EBUSY;

	mutex_lock(&mirror->lock);
	if (!mmu_interval_read_retry(&mirror->notifier, sequence)) {
		ret = mgpu_chunk_store(mirror, chunk, index, page,
				       MGPU_ENTRY_WRITE | MGPU_ENTRY_ATOMIC);
		if (!ret)
			ret = mgpu_chunk_sync(mirror, chunk);
	}
	mutex_unlock(&mirror->lock);
	return ret;
}

static int mgpu_try_page_exclusive(struct mgpu_mirror *mirror,
				   struct mgpu_chunk *chunk,
				   unsigned long address)
{
	struct mm_struct *mm = mirror->notifier.mm;
	unsigned long sequence;
	struct folio *folio;
	struct page *page;
	int ret;

	sequence = mmu_interval_read_begin(&mirror->notifier);
	mmap_read_lock(mm);
	page = make_device_exclusive(mm, address, mirror->unit, &folio);
	mmap_read_unlock(mm);
	if (IS_ERR(page))
		return PTR_ERR(page);
	ret = mgpu_store_exclusive(mirror, chunk, address >> PAGE_SHIFT, page,
				   sequence);
	folio_unlock(folio);
	folio_put(folio);
	return ret;
}

/*
 * A notifier comes in between when a huge page is split for it, and when a page
 * that is exclusive already is taken back first. So a further attempt starts
 * with a page that the CPU may write.
 */
static int mgpu_make_page_exclusive(struct mgpu_mirror *mirror,
				    struct mgpu_chunk *chunk,
				    unsigned long address)
{
	struct mm_struct *mm = mirror->notifier.mm;
	int ret;

	for (;;) {
		ret = mgpu_try_page_exclusive(mirror, chunk, address);
		if (ret != -EBUSY)
			return ret;
		if (fatal_signal_pending(current))
			return -EINTR;
		mmap_read_lock(mm);
		ret = fixup_user_fault(mm, address, FAULT_FLAG_WRITE, NULL);
		mmap_read_unlock(mm);
		if (ret)
			return ret;
	}
}

/* Makes pages [start, end) accessible to the unit alone. */
int mgpu_mirror_make_exclusive(struct mgpu_mirror *mirror, unsigned long start,
			       unsigned long end)
{
	struct mgpu_chunk *chunk;
	unsigned long address, to;
	int ret = 0;

	for (; start < end && !ret; start = to) {
		to = min(end, start + MGPU_WINDOW_BYTES);
		chunk = mgpu_chunk_alloc(mirror, start >> PAGE_SHIFT,
					 (to - start) >> PAGE_SHIFT);
		if (!chunk)
			return -ENOMEM;
		for (address = start; address < to && !ret; address += PAGE_SIZE)
			ret = mgpu_make_page_exclusive(mirror, chunk, address);
		mgpu_chunk_close(mirror, chunk);
	}
	return ret;
}
#else
int mgpu_mirror_make_exclusive(struct mgpu_mirror *mirror, unsigned long start,
			       unsigned long end)
{
	return -EOPNOTSUPP;
}
#endif

/* Whether the unit has exclusive access to none of the pages any more. */
int mgpu_mirror_check_exclusive(struct mgpu_mirror *mirror, unsigned long start,
				unsigned long end)
{
	unsigned long index;
	dma_addr_t address;
	struct page *page;
	int ret = 0;

	mutex_lock(&mirror->lock);
	for (index = start >> PAGE_SHIFT; index < end >> PAGE_SHIFT; index++)
		if (mgpu_mirror_entry(mirror, index, &page, &address) &
		    MGPU_ENTRY_ATOMIC)
			ret = -EPERM;
	mutex_unlock(&mirror->lock);
	return ret;
}
