// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Pages of a process to the unit's memory and back: on request, when a CPU
 * touches one, and when the device goes. The kernel unmaps and locks the pages
 * in between, so their bytes stand still while the device copies them:
 *
 *   setup (notifiers run: mirrors forget the pages)
 *   allocate, copy in one job
 *   pages, finalize
 */

#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "mgpu.h"

#ifdef MGPU_HAVE_LOCAL_MEMORY

/* A fault brings its neighbours back too: a job has a price, a page hardly any. */
#define MGPU_FAULT_AROUND	(64UL << PAGE_SHIFT)
/* How often pages that others hold for a moment are tried again at removal. */
#define MGPU_EVICT_ATTEMPTS	500

/* Up to a window of pages on their way. */
struct mgpu_migration {
	struct mgpu_unit *unit;
	/* Whether they go to the unit's memory. */
	bool to_local;
	/* Fails the next allocation of a huge page; NULL: does not. */
	u64 *flags;
	unsigned long npages;
	/* How many pages have arrived. */
	u64 moved;
	unsigned long src[MGPU_WINDOW_PAGES];
	unsigned long dst[MGPU_WINDOW_PAGES];
	/* The two sides of each page. No system page: it reads as zeros. */
	struct page *system[MGPU_WINDOW_PAGES];
	struct page *local[MGPU_WINDOW_PAGES];
};

static struct mgpu_migration *mgpu_migration_alloc(struct mgpu_unit *unit,
						   bool to_local)
{
	struct mgpu_migration *migration;

	migration = kvzalloc(sizeof(*migration), GFP_KERNEL);
	if (migration) {
		migration->unit = unit;
		migration->to_local = to_local;
	}
	return migration;
}

static bool mgpu_migration_must_fail(struct mgpu_migration *migration,
				     unsigned int order)
{
	if (!order || !migration->flags ||
	    !(*migration->flags & MGPU_HMM_FLAG_FAIL_ALLOC))
		return false;
	*migration->flags &= ~MGPU_HMM_FLAG_FAIL_ALLOC;
	return true;
}

/* A locked page on the other side. */
static struct page *mgpu_migration_new(struct mgpu_migration *migration,
				       unsigned int order)
{
	struct folio *folio;

	if (mgpu_migration_must_fail(migration, order))
		return NULL;
	if (migration->to_local)
		return mgpu_local_alloc(migration->unit, order);
	folio = folio_alloc(order ? GFP_TRANSHUGE : GFP_HIGHUSER_MOVABLE,
			    order);
	if (!folio)
		return NULL;
	folio_lock(folio);
	return folio_page(folio, 0);
}

/* Notes where @nr pages from @at on come from and go to. */
static void mgpu_migration_pair(struct mgpu_migration *migration,
				unsigned long at, struct page *source,
				struct page *target, unsigned long nr)
{
	unsigned long i;

	for (i = 0; i < nr; i++) {
		struct page *from = source ? source + i : NULL;

		migration->system[at + i] =
			migration->to_local ? from : target + i;
		migration->local[at + i] =
			migration->to_local ? target + i : from;
	}
}

/* A folio of 1 << @order pages for what is at @at; false: there is none. */
static bool mgpu_migration_allocate_at(struct mgpu_migration *migration,
				       unsigned long at, struct page *source,
				       unsigned int order, bool write)
{
	struct page *target = mgpu_migration_new(migration, order);

	if (!target)
		return false;
	mgpu_migration_pair(migration, at, source, target, 1UL << order);
	migration->dst[at] = migrate_pfn(page_to_pfn(target));
	if (write)
		migration->dst[at] |= MIGRATE_PFN_WRITE;
	if (order)
		migration->dst[at] |= MIGRATE_PFN_COMPOUND;
	return true;
}

/* Finds targets. A huge page for which there is no huge one is split into pages. */
static void mgpu_migration_allocate(struct mgpu_migration *migration,
				    bool fill_writable)
{
	unsigned long i, j, nr;

	for (i = 0; i < migration->npages; i += nr) {
		unsigned long src = migration->src[i];
		struct page *source = migrate_pfn_to_page(src);
		bool huge = src & MIGRATE_PFN_COMPOUND;
		bool write = src & MIGRATE_PFN_WRITE ||
			     (!source && fill_writable);

		nr = huge ? min(MGPU_WINDOW_PAGES, migration->npages - i) : 1;
		if (!(src & MIGRATE_PFN_MIGRATE))
			continue;
		if (huge && mgpu_migration_allocate_at(migration, i, source,
						       HPAGE_PMD_ORDER, write))
			continue;
		for (j = 0; j < nr; j++)
			if (!mgpu_migration_allocate_at(migration, i + j,
							source ? source + j : NULL,
							0, write))
				break;
	}
}

/* Gives the targets back: their sources stay where they are. */
static void mgpu_migration_abandon(struct mgpu_migration *migration)
{
	unsigned long i;

	for (i = 0; i < migration->npages; i++) {
		struct page *target = migrate_pfn_to_page(migration->dst[i]);

		migration->dst[i] = 0;
		if (!target)
			continue;
		unlock_page(target);
		put_page(target);
	}
}

/* Adds one page to the job. Returns how many pages it put into the window. */
static int mgpu_migration_add(struct mgpu_migration *migration,
			      struct mgpu_job *job, struct mgpu_dma *dma,
			      unsigned int slot, unsigned long i)
{
	enum dma_data_direction direction =
		migration->to_local ? DMA_TO_DEVICE : DMA_FROM_DEVICE;
	u64 local = mgpu_local_offset(migration->unit, migration->local[i]);
	u64 window;

	if (!migration->system[i]) {
		mgpu_job_clear(job, MGPU_SPACE_LOCAL, local);
		return 0;
	}
	job->addresses[slot] = mgpu_dma_map(migration->unit->device->dma, dma,
					    slot, migration->system[i],
					    direction);
	if (job->addresses[slot] == DMA_MAPPING_ERROR)
		return -ENOMEM;
	window = mgpu_job_add_page(job, job->addresses[slot]);
	if (migration->to_local)
		mgpu_job_copy(job, MGPU_SPACE_WINDOW, window, MGPU_SPACE_LOCAL,
			      local);
	else
		mgpu_job_copy(job, MGPU_SPACE_LOCAL, local, MGPU_SPACE_WINDOW,
			      window);
	return 1;
}

static int mgpu_migration_run(struct mgpu_migration *migration,
			      struct mgpu_job *job, struct mgpu_dma *dma,
			      unsigned int slots)
{
	int ret = 0;

	if (slots)
		ret = mgpu_dma_sync(migration->unit->device->dma, dma, 0, slots);
	if (!ret) {
		ret = mgpu_job_submit(job);
		ret = ret ?: mgpu_job_wait(job);
		ret = mgpu_job_end(job, ret);
	}
	return ret;
}

/* Copies all pairs, in one job. */
static int mgpu_migration_copy(struct mgpu_migration *migration)
{
	struct mgpu_unit *unit = migration->unit;
	struct device *dev = unit->device->dma;
	unsigned int slots = 0, pairs = 0;
	struct mgpu_job *job;
	struct mgpu_dma dma;
	unsigned long i;
	int ret = 0;

	mutex_lock(&unit->engine);
	job = mgpu_job_begin(unit);
	mgpu_dma_begin(dev, &dma);
	for (i = 0; i < migration->npages && ret >= 0; i++) {
		if (!migration->local[i])
			continue;
		pairs++;
		ret = mgpu_migration_add(migration, job, &dma, slots, i);
		slots += ret > 0;
	}
	if (ret >= 0)
		ret = pairs ? mgpu_migration_run(migration, job, &dma, slots) : 0;
	if (slots)
		mgpu_dma_unmap(dev, &dma, 0, slots, job->addresses);
	mgpu_dma_end(dev, &dma);
	mutex_unlock(&unit->engine);
	return ret;
}

static int mgpu_migration_fill(struct mgpu_migration *migration,
			       bool fill_writable)
{
	int ret;

	mgpu_migration_allocate(migration, fill_writable);
	if (mgpu_bug(MGPU_BUG_MIGRATE_WITHOUT_COPY))
		return 0;
	ret = mgpu_migration_copy(migration);
	if (ret)
		mgpu_migration_abandon(migration);
	return ret;
}

static void mgpu_migration_count(struct mgpu_migration *migration)
{
	unsigned long i;

	for (i = 0; i < migration->npages; i++)
		if (migration->src[i] & MIGRATE_PFN_MIGRATE && migration->dst[i])
			migration->moved +=
				folio_nr_pages(page_folio(migrate_pfn_to_page(migration->dst[i])));
}

/* Migrates [start, end) of a vma, at most a window, under the mmap lock. */
static int mgpu_migrate_vma(struct mgpu_migration *migration,
			    struct vm_area_struct *vma, unsigned long start,
			    unsigned long end, struct page *fault_page,
			    bool huge)
{
	struct migrate_vma args = {
		.vma = vma,
		.src = migration->src,
		.dst = migration->dst,
		.start = start,
		.end = end,
		.pgmap_owner = migration->unit,
		.flags = migration->to_local ? MIGRATE_VMA_SELECT_SYSTEM :
					       MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
		.fault_page = fault_page,
	};
	int ret;

	if (huge)
		args.flags |= MIGRATE_VMA_SELECT_COMPOUND;
	memset(migration->dst, 0, sizeof(migration->dst));
	memset(migration->system, 0, sizeof(migration->system));
	memset(migration->local, 0, sizeof(migration->local));
	ret = migrate_vma_setup(&args);
	if (ret)
		return ret;
	migration->npages = args.npages;
	ret = mgpu_migration_fill(migration, vma->vm_flags & VM_WRITE);
	migrate_vma_pages(&args);
	mgpu_migration_count(migration);
	migrate_vma_finalize(&args);
	return ret;
}

/* Migrates what can be migrated of [start, end), window by window. */
static int mgpu_migrate_range(struct mgpu_migration *migration,
			      struct mm_struct *mm, unsigned long start,
			      unsigned long end)
{
	struct vm_area_struct *vma;
	unsigned long to;
	int ret = 0;

	mmap_read_lock(mm);
	for (; start < end && !ret; start = to) {
		vma = vma_lookup(mm, start);
		if (!vma || !(vma->vm_flags & VM_READ)) {
			ret = -EINVAL;
			break;
		}
		to = min3(end, vma->vm_end, ALIGN(start + 1, HPAGE_PMD_SIZE));
		ret = mgpu_migrate_vma(migration, vma, start, to, NULL, true);
	}
	mmap_read_unlock(mm);
	return ret;
}

static int mgpu_migrate_mirrored(struct mgpu_mirror *mirror,
				 unsigned long start, unsigned long end,
				 bool to_local, u64 *moved)
{
	struct mgpu_migration *migration;
	int ret;

	migration = mgpu_migration_alloc(mirror->unit, to_local);
	if (!migration)
		return -ENOMEM;
	migration->flags = &mirror->flags;
	ret = mgpu_migrate_range(migration, mirror->notifier.mm, start, end);
	*moved = migration->moved;
	kvfree(migration);
	return ret;
}

int mgpu_migrate_to_local(struct mgpu_mirror *mirror, unsigned long start,
			  unsigned long end)
{
	u64 moved;

	return mgpu_migrate_mirrored(mirror, start, end, true, &moved);
}

int mgpu_migrate_to_system(struct mgpu_mirror *mirror, unsigned long start,
			   unsigned long end, u64 *moved)
{
	return mgpu_migrate_mirrored(mirror, start, end, false, moved);
}

/* A CPU touched a page of the unit's memory. */
vm_fault_t mgpu_migrate_fault(struct vm_fault *vmf)
{
	struct mgpu_unit *unit = page_pgmap(vmf->page)->owner;
	struct vm_area_struct *vma = vmf->vma;
	/* Without a page table the whole entry of the directory is one folio. */
	bool huge = !vmf->pte;
	unsigned long around = huge ? HPAGE_PMD_SIZE : MGPU_FAULT_AROUND;
	unsigned long start = ALIGN_DOWN(vmf->address, around);
	struct mgpu_migration *migration;
	int ret;

	migration = mgpu_migration_alloc(unit, false);
	if (!migration)
		return VM_FAULT_OOM;
	ret = mgpu_migrate_vma(migration, vma, max(start, vma->vm_start),
			       min(start + around, vma->vm_end), vmf->page,
			       huge);
	kvfree(migration);
	return ret ? VM_FAULT_SIGBUS : 0;
}

/* Brings a window of pages back, whichever process they belong to. */
static int mgpu_migrate_evict_some(struct mgpu_migration *migration,
				   unsigned int count)
{
	int ret;

	migration->npages = count;
	memset(migration->dst, 0, sizeof(migration->dst));
	memset(migration->system, 0, sizeof(migration->system));
	memset(migration->local, 0, sizeof(migration->local));
	migrate_device_pfns(migration->src, count);
	ret = mgpu_migration_fill(migration, false);
	migrate_device_pages(migration->src, migration->dst, count);
	migrate_device_finalize(migration->src, migration->dst, count);
	return ret;
}

/* Brings all pages of the unit's memory back to the system. */
int mgpu_migrate_evict(struct mgpu_unit *unit)
{
	struct mgpu_migration *migration;
	unsigned long from = 0, attempt;
	unsigned int count;
	int ret = 0;

	migration = mgpu_migration_alloc(unit, false);
	if (!migration)
		return -ENOMEM;
	for (attempt = 0; attempt < MGPU_EVICT_ATTEMPTS && !ret; attempt++) {
		count = mgpu_local_used(unit, &from, migration->src);
		if (count) {
			ret = mgpu_migrate_evict_some(migration, count);
			continue;
		}
		/* From the start again, for those that somebody held. */
		from = 0;
		count = mgpu_local_used(unit, &from, migration->src);
		from = 0;
		if (!count)
			break;
		msleep(20);
	}
	kvfree(migration);
	return ret;
}

#endif /* MGPU_HAVE_LOCAL_MEMORY */
