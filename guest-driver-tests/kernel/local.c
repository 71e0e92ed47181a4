// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Device memory of a unit. To the kernel it is device-private memory, which no
 * CPU can address; what the bytes are in is memory of the driver, behind one
 * resource that only jobs read and write. A page of the one is the page of the
 * same number of the other.
 */

#include <linux/bitmap.h>
#include <linux/ioport.h>
#include <linux/memremap.h>
#include <linux/slab.h>

#include "mgpu.h"

#ifdef MGPU_HAVE_LOCAL_MEMORY

struct mgpu_local {
	struct dev_pagemap pagemap;
	struct resource *resource;
	unsigned long first_pfn, npages;
	/* Guards which pages are used. */
	spinlock_t lock;
	unsigned long *used;
	unsigned int count;
	struct mgpu_buffer blocks[MGPU_LOCAL_BLOCKS_MAX];
};

static void mgpu_local_folio_free(struct folio *folio)
{
	struct mgpu_unit *unit = folio->pgmap->owner;
	struct mgpu_local *local = unit->local;
	unsigned long flags;

	spin_lock_irqsave(&local->lock, flags);
	bitmap_clear(local->used, folio_pfn(folio) - local->first_pfn,
		     folio_nr_pages(folio));
	spin_unlock_irqrestore(&local->lock, flags);
}

static const struct dev_pagemap_ops mgpu_local_ops = {
	.folio_free = mgpu_local_folio_free,
	.migrate_to_ram = mgpu_migrate_fault,
};

/* A locked page or folio with one reference, or NULL. */
struct page *mgpu_local_alloc(struct mgpu_unit *unit, unsigned int order)
{
	struct mgpu_local *local = unit->local;
	unsigned long flags, at, nr = 1UL << order;
	struct page *page;

	spin_lock_irqsave(&local->lock, flags);
	at = bitmap_find_next_zero_area(local->used, local->npages, 0, nr,
					nr - 1);
	if (at < local->npages)
		bitmap_set(local->used, at, nr);
	spin_unlock_irqrestore(&local->lock, flags);
	if (at >= local->npages)
		return NULL;
	page = pfn_to_page(local->first_pfn + at);
	/* Not page_folio(): it may still look like a part of what it was in before. */
	zone_device_folio_init((struct folio *)page, &local->pagemap, order);
	return page;
}

bool mgpu_local_owns(struct mgpu_unit *unit, struct page *page)
{
	struct mgpu_local *local = unit->local;

	return local && page_to_pfn(page) - local->first_pfn < local->npages;
}

/* Where the page is in the unit's resource of device memory. */
u64 mgpu_local_offset(struct mgpu_unit *unit, struct page *page)
{
	return (u64)(page_to_pfn(page) - unit->local->first_pfn) << PAGE_SHIFT;
}

/* The page as an I/O address. It has one for good. */
dma_addr_t mgpu_local_address(struct mgpu_unit *unit, struct page *page)
{
	u64 at = mgpu_local_offset(unit, page);

	return unit->local->blocks[at / MGPU_WINDOW_BYTES].dma +
	       at % MGPU_WINDOW_BYTES;
}

/* Up to a window of pages that are used, from *@from on, which moves past them. */
unsigned int mgpu_local_used(struct mgpu_unit *unit, unsigned long *from,
			     unsigned long *pfns)
{
	struct mgpu_local *local = unit->local;
	unsigned long flags, end;
	unsigned int count = 0;

	/* Where its setup failed. */
	if (!local->first_pfn)
		return 0;
	spin_lock_irqsave(&local->lock, flags);
	*from = find_next_bit(local->used, local->npages, *from);
	/* Never across a block, so that no folio is cut. */
	end = min(ALIGN(*from + 1, MGPU_WINDOW_PAGES), local->npages);
	for (; *from < end; ++*from)
		if (test_bit(*from, local->used))
			pfns[count++] = local->first_pfn + *from;
	spin_unlock_irqrestore(&local->lock, flags);
	return count;
}

static int mgpu_local_alloc_blocks(struct mgpu_unit *unit)
{
	struct mgpu_local *local = unit->local;
	unsigned int count = clamp(mgpu_local_mib / 2, 1U,
				   (unsigned int)MGPU_LOCAL_BLOCKS_MAX);

	local->npages = count * MGPU_WINDOW_PAGES;
	local->used = bitmap_zalloc(local->npages, GFP_KERNEL);
	if (!local->used)
		return -ENOMEM;
	for (; local->count < count; local->count++) {
		struct mgpu_buffer *block = &local->blocks[local->count];

		block->cpu = dma_alloc_coherent(unit->device->dma,
						MGPU_WINDOW_BYTES, &block->dma,
						GFP_KERNEL);
		if (!block->cpu)
			return -ENOMEM;
	}
	return mgpu_unit_create_resource(unit, MGPU_SPACE_LOCAL, local->blocks,
					 count, MGPU_WINDOW_BYTES);
}

/* Gives the memory page structs, at physical addresses that nothing else has. */
static int mgpu_local_make_pages(struct mgpu_unit *unit)
{
	struct mgpu_local *local = unit->local;
	struct dev_pagemap *pagemap = &local->pagemap;
	void *pages;

	local->resource = request_free_mem_region(&iomem_resource,
						  local->npages << PAGE_SHIFT,
						  unit->name);
	if (IS_ERR(local->resource))
		return PTR_ERR(local->resource);
	pagemap->type = MEMORY_DEVICE_PRIVATE;
	pagemap->range.start = local->resource->start;
	pagemap->range.end = local->resource->start +
			     (local->npages << PAGE_SHIFT) - 1;
	pagemap->nr_range = 1;
	pagemap->ops = &mgpu_local_ops;
	pagemap->owner = unit;
	pages = memremap_pages(pagemap, numa_mem_id());
	if (IS_ERR(pages))
		return PTR_ERR(pages);
	local->first_pfn = pagemap->range.start >> PAGE_SHIFT;
	return 0;
}

int mgpu_local_init(struct mgpu_unit *unit)
{
	int ret;

	unit->local = kzalloc(sizeof(*unit->local), GFP_KERNEL);
	if (!unit->local)
		return -ENOMEM;
	spin_lock_init(&unit->local->lock);
	ret = mgpu_local_alloc_blocks(unit);
	return ret ?: mgpu_local_make_pages(unit);
}

void mgpu_local_fini(struct mgpu_unit *unit)
{
	struct mgpu_local *local = unit->local;
	unsigned int i;

	if (!local)
		return;
	if (local->first_pfn)
		memunmap_pages(&local->pagemap);
	if (!IS_ERR_OR_NULL(local->resource))
		release_mem_region(local->resource->start,
				   resource_size(local->resource));
	for (i = 0; i < local->count; i++)
		dma_free_coherent(unit->device->dma, MGPU_WINDOW_BYTES,
				  local->blocks[i].cpu, local->blocks[i].dma);
	bitmap_free(local->used);
	unit->local = NULL;
	kfree(local);
}

#endif /* MGPU_HAVE_LOCAL_MEMORY */
