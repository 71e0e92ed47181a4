/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/*
 * The parts of the module and what each offers the others:
 *
 *   main.c     the virtio driver: probe, remove
 *   device.c   commands on the control queue, and the device's units
 *   job.c      one job of a unit: its window of pages, its stream, its fence
 *   tables.c   page tables that the device reads
 *   address_space.c  a context with such tables, and the flush of the TLB
 *   dma.c      pages as I/O addresses
 *   shadow.c   what the device may use of a process, by page number
 *   mirror.c   the mirror of a process: its notifier, its faults
 *   access.c   what the device does with mirrored pages
 *   local.c    device memory, as the kernel's device-private pages
 *   migrate.c  pages to device memory and back
 *   chardev.c  /dev/hmm_dmirror0 and 1
 *   bug.c      seeded bugs
 *
 * LOCKING: gate -> mirrors lock -> engine -> mirror lock -> flush lock -> queue
 * lock. A notifier takes the mirror lock and those behind it. A migration takes
 * the engine under the mmap lock and page locks, so whatever holds the engine
 * touches no user memory and allocates nothing that reclaims; the same holds for
 * the mirror lock and the flush lock.
 */
#ifndef MGPU_H
#define MGPU_H

#include <linux/completion.h>
#include <linux/idr.h>
#include <linux/kref.h>
#include <linux/miscdevice.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/virtio.h>
#include <linux/virtio_gpu.h>
#include <linux/xarray.h>

#include "bug.h"
#include "compat.h"
#include "hmm_uapi.h"

/* Pages that one job reaches, and that one chunk of a shadow covers. */
#define MGPU_WINDOW_PAGES	512UL
#define MGPU_WINDOW_BYTES	(MGPU_WINDOW_PAGES << PAGE_SHIFT)
#define MGPU_UNITS		2
#define MGPU_LOCAL_BLOCKS_MAX	64
/* Room for any command but those that carry entries or a stream. */
#define MGPU_COMMAND_ROOM	sizeof(struct virtio_gpu_ctx_create)
/* Contexts of the device: one for each unit, the others for mirrors. */
#define MGPU_CONTEXTS_MAX	64
/* The last page of an address space. */
#define MGPU_LAST_PAGE		((1ULL << (48 - PAGE_SHIFT)) - 1)

/* The resources of a unit; each unit has numbers of its own for them. */
enum mgpu_space {
	MGPU_SPACE_WINDOW = 1,	/* pages of the user, new ones for each job */
	MGPU_SPACE_STAGING,	/* a buffer of the driver */
	MGPU_SPACE_LOCAL,	/* what stands for device memory */
	MGPU_SPACES,
};

struct mgpu_as;
struct mgpu_device;
struct mgpu_local;
struct mgpu_mirror;
struct mgpu_table;
struct mgpu_unit;

/* A command and its response, in one allocation that the device reads and writes. */
struct mgpu_command {
	struct completion done;
	size_t room;
	size_t length;
	struct virtio_gpu_ctrl_hdr response;
	u8 request[] __aligned(8);
};

/* What a job does, while the engine of its unit is held. */
struct mgpu_job {
	struct mgpu_unit *unit;
	struct mgpu_command *attach;
	struct mgpu_command *submit;
	struct mgpu_command *detach;
	unsigned int entries;
	size_t window_bytes;
	/* A seeded bug has left it in flight; the next job ends it. */
	bool left;
	/* The packet that the next one may continue; NULL: none. */
	u32 *last;
	u64 last_from, last_to, last_bytes;
	enum mgpu_space last_spaces[2];
	/* For those who map pages for the job alone. */
	dma_addr_t addresses[MGPU_WINDOW_PAGES];
	/* The address space whose context it runs in; NULL: in the unit's. */
	struct mgpu_as *as;
	/* Mirrored pages that it uses, and its place among the mirror's jobs. */
	unsigned long first, end;
	struct list_head node;
	/* Pages of it were taken away under it, so it may fail. */
	bool overtaken;
};

struct mgpu_buffer {
	void *cpu;
	dma_addr_t dma;
};

/* One of two devices on the one GPU: a context with its memory. */
struct mgpu_unit {
	struct mgpu_device *device;
	unsigned int index;
	char name[16];
	struct miscdevice misc;
	/* Whoever holds it has the job, the window and the staging buffer. */
	struct mutex engine;
	struct mgpu_job job;
	struct mgpu_buffer staging;
	struct mgpu_local *local;
};

struct mgpu_device {
	struct kref kref;
	struct virtio_device *vdev;
	/* The device whose I/O address space the GPU uses. */
	struct device *dma;
	struct virtqueue *queue;
	spinlock_t queue_lock;
	u64 fence;
	/* Requests hold it for reading. Written once, when the device goes. */
	struct rw_semaphore gate;
	bool gone;
	/* The device did not answer; it has been reset. */
	bool broken;
	struct mutex mirrors_lock;
	struct list_head mirrors;
	/* Whether jobs find the pages of a process by page tables. */
	bool tables;
	/* The numbers of contexts. */
	struct ida contexts;
	/* Guards the flush and the order of it and of what makes contexts. */
	struct mutex flush_lock;
	struct mgpu_command *flush;
	struct mgpu_unit units[MGPU_UNITS];
};

/* device.c */
struct mgpu_command *mgpu_command_alloc(size_t room);
void *mgpu_command_begin(struct mgpu_command *command, u32 type, u32 context,
			 size_t size);
void mgpu_command_words(struct mgpu_command *command, u32 type, u32 context,
			const u32 *words, size_t count);
int mgpu_command_queue(struct mgpu_device *device,
		       struct mgpu_command *command);
int mgpu_command_await(struct mgpu_device *device,
		       struct mgpu_command *command);
int mgpu_command_wait(struct mgpu_device *device, struct mgpu_command *command);
void mgpu_queue_interrupt(struct virtqueue *queue);
void mgpu_device_stop(struct mgpu_device *device);
int mgpu_unit_init(struct mgpu_unit *unit);
void mgpu_unit_fini(struct mgpu_unit *unit);
int mgpu_unit_create_resource(struct mgpu_unit *unit, enum mgpu_space space,
			      const struct mgpu_buffer *blocks,
			      unsigned int count, size_t block_bytes);
void mgpu_unit_renew_context(struct mgpu_unit *unit);
u32 mgpu_unit_resource(const struct mgpu_unit *unit, enum mgpu_space space);

/* main.c */
void mgpu_device_get(struct mgpu_device *device);
void mgpu_device_put(struct mgpu_device *device);

/* chardev.c */
int mgpu_chardev_register(struct mgpu_unit *unit);
void mgpu_chardev_unregister(struct mgpu_unit *unit);

/* job.c */
int mgpu_job_alloc(struct mgpu_unit *unit);
void mgpu_job_free(struct mgpu_unit *unit);
struct mgpu_job *mgpu_job_begin(struct mgpu_unit *unit);
u64 mgpu_job_add_page(struct mgpu_job *job, dma_addr_t address);
void mgpu_job_copy(struct mgpu_job *job, enum mgpu_space from, u64 from_at,
		   enum mgpu_space to, u64 to_at);
void mgpu_job_clear(struct mgpu_job *job, enum mgpu_space space, u64 at);
void mgpu_job_copy_mapped(struct mgpu_job *job, struct mgpu_as *as,
			  unsigned long first, unsigned long count, bool write);
int mgpu_job_submit(struct mgpu_job *job);
int mgpu_job_wait(struct mgpu_job *job);
int mgpu_job_end(struct mgpu_job *job, int result);

/* dma.c */
struct mgpu_dma {
	struct dma_iova_state state;
};

void mgpu_dma_begin(struct device *dev, struct mgpu_dma *dma);
dma_addr_t mgpu_dma_map(struct device *dev, struct mgpu_dma *dma,
			unsigned int index, struct page *page,
			enum dma_data_direction direction);
int mgpu_dma_sync(struct device *dev, struct mgpu_dma *dma, unsigned int index,
		  unsigned int count);
void mgpu_dma_unmap(struct device *dev, struct mgpu_dma *dma,
		    unsigned int index, unsigned int count,
		    const dma_addr_t *addresses);
void mgpu_dma_end(struct device *dev, struct mgpu_dma *dma);

/* tables.c */
int mgpu_tables_init(struct mgpu_as *as);
void mgpu_tables_fini(struct mgpu_as *as);
u64 mgpu_tables_root(const struct mgpu_as *as);
struct mgpu_table *mgpu_tables_hold(struct mgpu_mirror *mirror,
				    unsigned long index);
void mgpu_tables_release(struct mgpu_as *as, struct mgpu_table *table);
void mgpu_tables_set(struct mgpu_as *as, unsigned long index,
		     dma_addr_t address, u8 flags);
void mgpu_tables_clear(struct mgpu_as *as, unsigned long index);
bool mgpu_tables_unlinked(const struct mgpu_as *as);
void mgpu_tables_free_unlinked(struct mgpu_as *as);

/* address_space.c */
#define MGPU_AS_COMMANDS	4

struct mgpu_as {
	struct mgpu_unit *unit;
	/* The number of the context and of the address space; 0: there is none. */
	u32 id;
	/* Guarded by the flush lock: the device has, or is about to have, the context. */
	bool live;
	struct mgpu_command *commands[MGPU_AS_COMMANDS];
	/* Guarded by the mirror's lock. */
	struct mgpu_table *root;
	/* Tables that were taken out, until they are flushed and freed. */
	struct list_head unlinked;
};

int mgpu_as_create(struct mgpu_as *as, struct mgpu_unit *unit);
void mgpu_as_renew(struct mgpu_as *as);
void mgpu_as_end(struct mgpu_as *as);
void mgpu_as_destroy(struct mgpu_as *as);
void mgpu_as_flush(struct mgpu_as *as, unsigned long first, unsigned long last,
		   bool leaves);
int mgpu_device_probe_tables(struct mgpu_device *device);
void mgpu_device_free_tables(struct mgpu_device *device);

/* shadow.c */
#define MGPU_ENTRY_PRESENT	BIT(0)
#define MGPU_ENTRY_WRITE	BIT(1)
#define MGPU_ENTRY_ATOMIC	BIT(2)
#define MGPU_ENTRY_LOCAL	BIT(3)	/* a page of the unit's memory: no I/O address */
#define MGPU_ENTRY_UNMAPPED	BIT(4)	/* a seeded bug has unmapped it */
#define MGPU_ENTRY_IN_TABLE	BIT(5)	/* the device's page table has it */

/* Pages that were looked up together, with one range of I/O addresses. */
struct mgpu_chunk {
	unsigned long first;
	unsigned int live;
	struct mgpu_dma dma;
	struct page *pages[MGPU_WINDOW_PAGES];
	dma_addr_t addresses[MGPU_WINDOW_PAGES];
	u8 flags[MGPU_WINDOW_PAGES];
	/* Held until the caller closes it. */
	struct mgpu_table *tables[2];
};

struct mgpu_mirror {
	struct mgpu_unit *unit;
	struct mmu_interval_notifier notifier;
	struct mgpu_as as;
	/* Guards the shadow, the page tables and the list of jobs. */
	struct mutex lock;
	/* By page number: the chunk whose entry holds. */
	struct xarray shadow;
	struct list_head jobs;
	struct list_head node;
	u64 flags;
};

u8 mgpu_mirror_entry(struct mgpu_mirror *mirror, unsigned long index,
		     struct page **page, dma_addr_t *address);
struct mgpu_chunk *mgpu_chunk_alloc(struct mgpu_mirror *mirror,
				    unsigned long first, unsigned long count);
void mgpu_chunk_close(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk);
int mgpu_chunk_store(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
		     unsigned long index, struct page *page, u8 flags);
int mgpu_chunk_sync(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk);
void mgpu_chunk_drop(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
		     unsigned long first, unsigned long last);
void mgpu_chunk_clear(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
		      unsigned long index);
void mgpu_chunk_protect(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
			unsigned long index);
void mgpu_chunk_shorten(struct mgpu_mirror *mirror, struct mgpu_chunk *chunk,
			unsigned int at);

/* mirror.c */
enum mgpu_lookup {
	MGPU_LOOKUP_READ,
	MGPU_LOOKUP_READ_UNLOCKED,
	MGPU_LOOKUP_WRITE,
	/* No fault: what is in the unit's memory now. */
	MGPU_LOOKUP_LOCAL,
};

struct mgpu_mirror *mgpu_mirror_open(struct mgpu_unit *unit);
void mgpu_mirror_close(struct mgpu_mirror *mirror);
void mgpu_mirror_forget(struct mgpu_mirror *mirror, unsigned long first,
			unsigned long last);
void mgpu_mirror_end(struct mgpu_mirror *mirror);
int mgpu_mirror_fault(struct mgpu_mirror *mirror, unsigned long start,
		      unsigned long end, enum mgpu_lookup lookup);

/* access.c */
int mgpu_mirror_copy(struct mgpu_mirror *mirror, unsigned long start,
		     unsigned long npages, void *buffer, bool write,
		     unsigned long *copied);
int mgpu_mirror_snapshot(struct mgpu_mirror *mirror, unsigned long start,
			 unsigned long npages, u8 *permissions);
int mgpu_mirror_make_exclusive(struct mgpu_mirror *mirror, unsigned long start,
			       unsigned long end);
int mgpu_mirror_check_exclusive(struct mgpu_mirror *mirror, unsigned long start,
				unsigned long end);

/* local.c */
#ifdef MGPU_HAVE_LOCAL_MEMORY
int mgpu_local_init(struct mgpu_unit *unit);
void mgpu_local_fini(struct mgpu_unit *unit);
struct page *mgpu_local_alloc(struct mgpu_unit *unit, unsigned int order);
bool mgpu_local_owns(struct mgpu_unit *unit, struct page *page);
u64 mgpu_local_offset(struct mgpu_unit *unit, struct page *page);
dma_addr_t mgpu_local_address(struct mgpu_unit *unit, struct page *page);
unsigned int mgpu_local_used(struct mgpu_unit *unit, unsigned long *from,
			     unsigned long *pfns);

/* migrate.c */
int mgpu_migrate_to_local(struct mgpu_mirror *mirror, unsigned long start,
			  unsigned long end);
int mgpu_migrate_to_system(struct mgpu_mirror *mirror, unsigned long start,
			   unsigned long end, u64 *moved);
int mgpu_migrate_evict(struct mgpu_unit *unit);
vm_fault_t mgpu_migrate_fault(struct vm_fault *vmf);
#else
static inline int mgpu_local_init(struct mgpu_unit *unit)
{
	return 0;
}

static inline void mgpu_local_fini(struct mgpu_unit *unit)
{
}

static inline bool mgpu_local_owns(struct mgpu_unit *unit, struct page *page)
{
	return false;
}

static inline u64 mgpu_local_offset(struct mgpu_unit *unit, struct page *page)
{
	return 0;
}

static inline dma_addr_t mgpu_local_address(struct mgpu_unit *unit,
					    struct page *page)
{
	return DMA_MAPPING_ERROR;
}

/* Without device memory nothing migrates, which is no error. */
static inline int mgpu_migrate_to_local(struct mgpu_mirror *mirror,
					unsigned long start, unsigned long end)
{
	return 0;
}

static inline int mgpu_migrate_to_system(struct mgpu_mirror *mirror,
					 unsigned long start, unsigned long end,
					 u64 *moved)
{
	return 0;
}

static inline int mgpu_migrate_evict(struct mgpu_unit *unit)
{
	return 0;
}
#endif

extern unsigned int mgpu_local_mib;
extern bool mgpu_tables;

#endif /* MGPU_H */
