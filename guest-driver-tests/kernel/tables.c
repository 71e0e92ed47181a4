// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The page tables of an address space, which the device reads: four levels of
 * 512 entries, a page each. Beside each table is what the CPU needs to find its
 * way: the tables below and above, and how many entries are in use.
 *
 *   hold -> set ... clear -> release
 *
 * A lookup holds the tables of its pages before it takes the mirror's lock,
 * because only there memory can be had. Without entries and holds a table is
 * taken out of the one above. It stays mapped and keeps its page until the
 * device has been told: the caller flushes, then frees what was taken out.
 *
 * INVARIANT: an entry is written in one store, after what it points to can be
 * reached; what it pointed to stays mapped until a flush behind its clearing.
 *
 * LOCKING: everything here is called with the mirror's lock held but for
 * mgpu_tables_init(), mgpu_tables_hold() and mgpu_tables_fini().
 */

#include <linux/delay.h>
#include <linux/slab.h>

#include "mgpu.h"
#include "mirrorgpu_job.h"

#define MGPU_TABLE_BITS		9
#define MGPU_TABLE_ENTRIES	(1U << MGPU_TABLE_BITS)
#define MGPU_TABLE_TOP		3

struct mgpu_table {
	/* NULL: the root, or taken out. */
	struct mgpu_table *above;
	/* Of the table above. */
	unsigned int at;
	unsigned int level;
	/* Entries, and lookups that are about to write some. */
	unsigned int used;
	/* NULL: a seeded bug has freed it. */
	__le64 *entries;
	dma_addr_t dma;
	struct list_head node;
	/* One for each entry, at levels above 0. */
	struct mgpu_table *below[];
};

static unsigned int mgpu_table_at(unsigned long index, unsigned int level)
{
	return index >> (level * MGPU_TABLE_BITS) & (MGPU_TABLE_ENTRIES - 1);
}

/* Unmaps a table, which no walk of the device comes to any more, and frees its page. */
static void mgpu_table_free_page(struct mgpu_as *as, struct mgpu_table *table)
{
	if (!table->entries)
		return;
	dma_unmap_page(as->unit->device->dma, table->dma, PAGE_SIZE,
		       DMA_TO_DEVICE);
	free_page((unsigned long)table->entries);
	table->entries = NULL;
}

static void mgpu_table_free(struct mgpu_as *as, struct mgpu_table *table)
{
	mgpu_table_free_page(as, table);
	kfree(table);
}

/* An empty table, mapped for the device to read. */
static struct mgpu_table *mgpu_table_alloc(struct mgpu_as *as,
					   unsigned int level)
{
	struct device *dev = as->unit->device->dma;
	struct mgpu_table *table;

	table = kzalloc(struct_size(table, below,
				    level ? MGPU_TABLE_ENTRIES : 0),
			GFP_KERNEL);
	if (!table)
		return NULL;
	table->level = level;
	table->entries = (__le64 *)get_zeroed_page(GFP_KERNEL);
	if (!table->entries)
		goto free_table;
	table->dma = dma_map_page(dev, virt_to_page(table->entries), 0,
				  PAGE_SIZE, DMA_TO_DEVICE);
	if (dma_mapping_error(dev, table->dma))
		goto free_page;
	return table;

free_page:
	free_page((unsigned long)table->entries);
free_table:
	kfree(table);
	return NULL;
}

static void mgpu_table_write(struct mgpu_as *as, struct mgpu_table *table,
			     unsigned int at, u64 entry)
{
	/* What the entry points to comes before it. */
	dma_wmb();
	WRITE_ONCE(table->entries[at], cpu_to_le64(entry));
	dma_sync_single_for_device(as->unit->device->dma,
				   table->dma + at * sizeof(*table->entries),
				   sizeof(*table->entries), DMA_TO_DEVICE);
}

static void mgpu_table_link(struct mgpu_as *as, struct mgpu_table *above,
			    unsigned int at, struct mgpu_table *table)
{
	table->above = above;
	table->at = at;
	above->below[at] = table;
	above->used++;
	mgpu_table_write(as, above, at, table->dma | MIRRORGPU_PTE_VALID);
}

/* Takes a table that is not used out of the one above, and so on up. */
static void mgpu_table_unlink_unused(struct mgpu_as *as,
				     struct mgpu_table *table)
{
	struct mgpu_table *above;

	for (; table->above && !table->used; table = above) {
		above = table->above;
		if (mgpu_bug(MGPU_BUG_FREE_TABLE_EARLY)) {
			mgpu_table_free_page(as, table);
			usleep_range(1000, 2000);
		}
		mgpu_table_write(as, above, table->at, 0);
		above->below[table->at] = NULL;
		above->used--;
		table->above = NULL;
		list_add_tail(&table->node, &as->unlinked);
	}
}

/* How far down there are tables for a page: to level 0, or to where the next is missing. */
static struct mgpu_table *mgpu_tables_find(struct mgpu_as *as,
					   unsigned long index)
{
	struct mgpu_table *table = as->root, *below;

	while (table->level) {
		below = table->below[mgpu_table_at(index, table->level)];
		if (!below)
			break;
		table = below;
	}
	return table;
}

/*
 * Puts @spare where it is missing, and takes a hold when the tables of a page
 * are complete. Returns the level whose table is missing, -1: none.
 */
static int mgpu_tables_try_hold(struct mgpu_mirror *mirror, unsigned long index,
				struct mgpu_table **spare,
				struct mgpu_table **held)
{
	struct mgpu_as *as = &mirror->as;
	struct mgpu_table *table;
	int missing;

	mutex_lock(&mirror->lock);
	table = mgpu_tables_find(as, index);
	if (*spare && table->level == (*spare)->level + 1) {
		mgpu_table_link(as, table, mgpu_table_at(index, table->level),
				*spare);
		table = *spare;
		*spare = NULL;
	}
	missing = (int)table->level - 1;
	if (missing < 0) {
		table->used++;
		*held = table;
	}
	mutex_unlock(&mirror->lock);
	return missing;
}

/* Completes the tables of a page. The one of level 0 is kept until it is released. */
struct mgpu_table *mgpu_tables_hold(struct mgpu_mirror *mirror,
				    unsigned long index)
{
	struct mgpu_table *spare = NULL, *held = NULL;
	int missing;

	for (;;) {
		missing = mgpu_tables_try_hold(mirror, index, &spare, &held);
		/* Another lookup has put one there meanwhile. */
		if (spare)
			mgpu_table_free(&mirror->as, spare);
		if (missing < 0)
			return held;
		spare = mgpu_table_alloc(&mirror->as, missing);
		if (!spare)
			return NULL;
	}
}

/* Ends a hold. What is taken out then waits for a flush. */
void mgpu_tables_release(struct mgpu_as *as, struct mgpu_table *table)
{
	table->used--;
	mgpu_table_unlink_unused(as, table);
}

static u64 mgpu_tables_leaf(dma_addr_t address, u8 flags)
{
	u64 entry = address | MIRRORGPU_PTE_VALID | MIRRORGPU_PTE_READ;

	if (flags & MGPU_ENTRY_WRITE)
		entry |= MIRRORGPU_PTE_WRITE;
	if (flags & MGPU_ENTRY_ATOMIC)
		entry |= MIRRORGPU_PTE_ATOMIC;
	return entry;
}

/* Maps a page. Its tables are held, or it was mapped before. */
void mgpu_tables_set(struct mgpu_as *as, unsigned long index,
		     dma_addr_t address, u8 flags)
{
	struct mgpu_table *table = mgpu_tables_find(as, index);

	if (WARN_ON_ONCE(table->level))
		return;
	if (!(flags & MGPU_ENTRY_IN_TABLE))
		table->used++;
	mgpu_table_write(as, table, mgpu_table_at(index, 0),
			 mgpu_tables_leaf(address, flags));
}

/* Ends the mapping of a page. Its tables, if they are not used any more, wait for a flush. */
void mgpu_tables_clear(struct mgpu_as *as, unsigned long index)
{
	struct mgpu_table *table = mgpu_tables_find(as, index);

	if (WARN_ON_ONCE(table->level))
		return;
	if (!mgpu_bug(MGPU_BUG_KEEP_ENTRY))
		mgpu_table_write(as, table, mgpu_table_at(index, 0), 0);
	table->used--;
	mgpu_table_unlink_unused(as, table);
}

/* Whether tables wait for a flush, to be freed. */
bool mgpu_tables_unlinked(const struct mgpu_as *as)
{
	return !list_empty(&as->unlinked);
}

/* Frees the tables that were taken out, behind the flush. */
void mgpu_tables_free_unlinked(struct mgpu_as *as)
{
	struct mgpu_table *table, *next;

	list_for_each_entry_safe(table, next, &as->unlinked, node)
		mgpu_table_free(as, table);
	INIT_LIST_HEAD(&as->unlinked);
}

int mgpu_tables_init(struct mgpu_as *as)
{
	INIT_LIST_HEAD(&as->unlinked);
	as->root = mgpu_table_alloc(as, MGPU_TABLE_TOP);
	return as->root ? 0 : -ENOMEM;
}

/* Where the device would begin. */
u64 mgpu_tables_root(const struct mgpu_as *as)
{
	return as->root->dma;
}

/* A table without tables below, on the way down from @table. */
static struct mgpu_table *mgpu_table_lowest(struct mgpu_table *table)
{
	unsigned int at = 0;

	while (table->level && at < MGPU_TABLE_ENTRIES) {
		if (table->below[at]) {
			table = table->below[at];
			at = 0;
		} else {
			at++;
		}
	}
	return table;
}

/* Frees all tables. The device knows nothing of them any more. */
void mgpu_tables_fini(struct mgpu_as *as)
{
	struct mgpu_table *table, *above;

	if (!as->root)
		return;
	mgpu_tables_free_unlinked(as);
	do {
		table = mgpu_table_lowest(as->root);
		above = table->above;
		if (above)
			above->below[table->at] = NULL;
		mgpu_table_free(as, table);
	} while (above);
	as->root = NULL;
}
