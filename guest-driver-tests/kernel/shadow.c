// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The shadow of a process's page table: by page number, what the device may use
 * and under which I/O address. Pages that were looked up together are a chunk,
 * which lives until its last entry is gone. An entry holds no reference to its
 * page; the mirror's notifier ends it. With page tables, what is here is there
 * too.
 */

#include <linux/slab.h>

#include "mgpu.h"

static void mgpu_chunk_free(struct mgpu_mirror *mirror,
			    struct mgpu_chunk *chunk)
{
	/* Addresses that are still mapped must not be given to others. */
	if (!mgpu_bug(MGPU_BUG_LEAK_MAPPING))
		mgpu_dma_end(mirror->unit->device->dma, &chunk->dma);
	kvfree(chunk);
}

/* Lets go of the tables; those that nothing uses go, behind a flush. */
static void mgpu_chunk_release_tables(struct mgpu_mirror *mirror,
				      struct mgpu_chunk *chunk)
{
	struct mgpu_as *as = &mirror->as;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(chunk->tables); i++) {
		if (chunk->tables[i])
			mgpu_tables_release(as, chunk->tables[i]);
		chunk->tables[i] = NULL;
	}
	if (!mirror->unit->device->tables || !mgpu_tables_unlinked(as))
		return;
	mgpu_as_flush(as, chunk->first, chunk->first + MGPU_WINDOW_PAGES - 1,
		      mgpu_bug(MGPU_BUG_LEAVES_FOR_TABLE));
	mgpu_tables_free_unlinked(as);
}

/* Makes room for @count pages in the shadow, and in the page tables. */
static int mgpu_chunk_reserve(struct mgpu_mirror *mirror,
			      struct mgpu_chunk *chunk, unsigned long count)
{
	unsigned long i;

	for (i = 0; i < count; i++)
		if (xa_reserve(&mirror->shadow, chunk->first + i, GFP_KERNEL))
			return -ENOMEM;
	if (!mirror->unit->device->tables)
		return 0;
	/* A window lies in two tables at most: that of its first page, and that of its last. */
	chunk->tables[0] = mgpu_tables_hold(mirror, chunk->first);
	chunk->tables[1] = mgpu_tables_hold(mirror, chunk->first + count - 1);
	return chunk->tables[0] && chunk->tables[1] ? 0 : -ENOMEM;
}

/* An empty chunk for pages from @first on, with room for them. */
struct mgpu_chunk *mgpu_chunk_alloc(struct mgpu_mirror *mirror,
				    unsigned long first, unsigned long count)
{
	struct mgpu_chunk *chunk;

	chunk = kvzalloc(sizeof(*chunk), GFP_KERNEL);
	if (!chunk)
		return NULL;
	chunk->first = first;
	/* The caller's hold, which mgpu_chunk_close() ends. */
	chunk->live = 1;
	mgpu_dma_begin(mirror->unit->device->dma, &chunk->dma);
	if (mgpu_chunk_reserve(mirror, chunk, count)) {
		mgpu_chunk_close(mirror, chunk);
		return NULL;
	}
	return chunk;
}

/* Ends the caller's hold: the chunk lives on with its entries. */
void mgpu_chunk_close(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk)
{
	bool dead;

	mutex_lock(&mirror->lock);
	mgpu_chunk_release_tables(mirror, chunk);
	dead = !--chunk->live;
	mutex_unlock(&mirror->lock);
	if (dead)
		mgpu_chunk_free(mirror, chunk);
}

/* Unmaps entries [from, to) of a chunk, which all have I/O addresses. */
static void mgpu_chunk_unmap(struct mgpu_mirror *mirror,
			     struct mgpu_chunk *chunk, unsigned int from,
			     unsigned int to)
{
	if (from == to || mgpu_bug(MGPU_BUG_LEAK_MAPPING))
		return;
	mgpu_dma_unmap(mirror->unit->device->dma, &chunk->dma, from, to - from,
		       chunk->addresses);
}

/* Takes a page out of the device's page table; it stays mapped for DMA. */
void mgpu_chunk_clear(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
		      unsigned long index)
{
	u8 *flags = &chunk->flags[index - chunk->first];

	if (*flags & MGPU_ENTRY_IN_TABLE)
		mgpu_tables_clear(&mirror->as, index);
	*flags &= ~MGPU_ENTRY_IN_TABLE;
}

/* Bug: a page may be read further, where it should have been taken away. */
void mgpu_chunk_protect(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
			unsigned long index)
{
	unsigned int at = index - chunk->first;

	chunk->flags[at] &= ~(MGPU_ENTRY_WRITE | MGPU_ENTRY_ATOMIC);
	if (chunk->flags[at] & MGPU_ENTRY_IN_TABLE)
		mgpu_tables_set(&mirror->as, index, chunk->addresses[at],
				chunk->flags[at]);
}

/* Takes the entries of a chunk among pages [first, last] out of the shadow. */
void mgpu_chunk_drop(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
		     unsigned long first, unsigned long last)
{
	unsigned int from = max(first, chunk->first) - chunk->first;
	unsigned int to = min(last - chunk->first, MGPU_WINDOW_PAGES - 1) + 1;
	unsigned int run = from, i;

	for (i = from; i < to; i++) {
		u8 flags = chunk->flags[i];

		if (!(flags & MGPU_ENTRY_PRESENT) ||
		    flags & (MGPU_ENTRY_LOCAL | MGPU_ENTRY_UNMAPPED)) {
			mgpu_chunk_unmap(mirror, chunk, run, i);
			run = i + 1;
		}
		if (flags & MGPU_ENTRY_PRESENT) {
			xa_erase(&mirror->shadow, chunk->first + i);
			chunk->flags[i] = 0;
			chunk->live--;
		}
	}
	mgpu_chunk_unmap(mirror, chunk, run, i);
	if (!chunk->live)
		mgpu_chunk_free(mirror, chunk);
}

/* What the shadow says of a page: MGPU_ENTRY_*, 0: nothing. */
u8 mgpu_mirror_entry(struct mgpu_mirror *mirror, unsigned long index,
		     struct page **page, dma_addr_t *address)
{
	struct mgpu_chunk *chunk = xa_load(&mirror->shadow, index);

	lockdep_assert_held(&mirror->lock);
	if (!chunk)
		return 0;
	*page = chunk->pages[index - chunk->first];
	*address = chunk->addresses[index - chunk->first];
	return chunk->flags[index - chunk->first];
}

static dma_addr_t mgpu_chunk_map(struct mgpu_mirror *mirror,
				 struct mgpu_chunk *chunk, unsigned int at,
				 struct page *page, u8 flags)
{
	enum dma_data_direction direction = DMA_TO_DEVICE;

	if (flags & MGPU_ENTRY_WRITE && !mgpu_bug(MGPU_BUG_WRONG_DIRECTION))
		direction = DMA_BIDIRECTIONAL;
	return mgpu_dma_map(mirror->unit->device->dma, &chunk->dma, at, page,
			    direction);
}

/* Stores a page, with an I/O address if it is the system's. */
int mgpu_chunk_store(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
		     unsigned long index, struct page *page, u8 flags)
{
	unsigned int at = index - chunk->first;
	dma_addr_t address;
	struct page *old;
	u8 held;

	flags |= MGPU_ENTRY_PRESENT;
	if (mgpu_local_owns(mirror->unit, page))
		flags |= MGPU_ENTRY_LOCAL;
	held = mgpu_mirror_entry(mirror, index, &old, &address);
	if (held && old == page && (held & flags) == flags)
		return 0;
	if (held)
		mgpu_mirror_forget(mirror, index, index);
	if (flags & MGPU_ENTRY_LOCAL) {
		chunk->addresses[at] = mgpu_local_address(mirror->unit, page);
	} else {
		chunk->addresses[at] = mgpu_chunk_map(mirror, chunk, at, page,
						      flags);
		if (chunk->addresses[at] == DMA_MAPPING_ERROR)
			return -ENOMEM;
	}
	/* Its place was reserved; where a notifier took that, there may be no memory. */
	if (xa_is_err(xa_store(&mirror->shadow, index, chunk, GFP_NOWAIT))) {
		if (!(flags & MGPU_ENTRY_LOCAL))
			mgpu_chunk_unmap(mirror, chunk, at, at + 1);
		return -ENOMEM;
	}
	chunk->pages[at] = page;
	chunk->flags[at] = flags;
	chunk->live++;
	return 0;
}

/*
 * Makes what was stored known to the IOMMU, before a job uses it, and then to
 * the device.
 */
int mgpu_chunk_sync(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk)
{
	unsigned int i;
	int ret;

	ret = mgpu_dma_sync(mirror->unit->device->dma, &chunk->dma, 0,
			    MGPU_WINDOW_PAGES);
	if (ret || !mirror->unit->device->tables)
		return ret;
	for (i = 0; i < MGPU_WINDOW_PAGES; i++) {
		if (!(chunk->flags[i] & MGPU_ENTRY_PRESENT) ||
		    chunk->flags[i] & MGPU_ENTRY_IN_TABLE)
			continue;
		mgpu_tables_set(&mirror->as, chunk->first + i,
				chunk->addresses[i], chunk->flags[i]);
		chunk->flags[i] |= MGPU_ENTRY_IN_TABLE;
	}
	return 0;
}

/* Bug: the mapping of a chunk is a page shorter than what is used of it. */
void mgpu_chunk_shorten(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
			unsigned int at)
{
	if ((chunk->flags[at] & (MGPU_ENTRY_PRESENT | MGPU_ENTRY_LOCAL)) !=
	    MGPU_ENTRY_PRESENT)
		return;
	mgpu_chunk_unmap(mirror, chunk, at, at + 1);
	chunk->flags[at] |= MGPU_ENTRY_UNMAPPED;
}
