/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/*
 * What differs between the kernels that this module builds for, 6.12 and 7.3.
 * No other file looks at the version.
 */
#ifndef MGPU_COMPAT_H
#define MGPU_COMPAT_H

#include <linux/dma-mapping.h>
#include <linux/hmm.h>
#include <linux/mmu_notifier.h>
#include <linux/rmap.h>
#include <linux/version.h>

/* Device-private folios of more than one page, and callbacks that take folios. */
#if defined(CONFIG_DEVICE_PRIVATE) && LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
#define MGPU_HAVE_LOCAL_MEMORY
#endif

/* make_device_exclusive() for one page, exported. */
#if defined(CONFIG_DEVICE_PRIVATE) && LINUX_VERSION_CODE >= KERNEL_VERSION(6, 15, 0)
#define MGPU_HAVE_EXCLUSIVE
#endif

/* A fault that may drop the mmap lock, which userfaultfd needs. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 3, 0)
#define MGPU_HAVE_UNLOCKED_FAULT
#endif

/* Whether a notifier runs because pages become exclusive to @owner. */
static inline bool mgpu_becomes_exclusive(const struct mmu_notifier_range *range,
					  const void *owner)
{
#ifdef MGPU_HAVE_EXCLUSIVE
	return range->event == MMU_NOTIFY_EXCLUSIVE && range->owner == owner;
#else
	return false;
#endif
}

#ifndef MGPU_HAVE_UNLOCKED_FAULT
static inline int hmm_range_fault_unlocked_timeout(struct hmm_range *range,
						   unsigned long timeout)
{
	return -EOPNOTSUPP;
}
#endif

/* One I/O address range for pages that are linked into it one by one. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
struct dma_iova_state {
	dma_addr_t addr;
};

static inline bool dma_use_iova(struct dma_iova_state *state)
{
	return false;
}

static inline bool dma_iova_try_alloc(struct device *dev,
				      struct dma_iova_state *state,
				      phys_addr_t phys, size_t size)
{
	return false;
}

static inline void dma_iova_free(struct device *dev,
				 struct dma_iova_state *state)
{
}

static inline int dma_iova_link(struct device *dev,
				struct dma_iova_state *state, phys_addr_t phys,
				size_t offset, size_t size,
				enum dma_data_direction dir,
				unsigned long attrs)
{
	return -EOPNOTSUPP;
}

static inline int dma_iova_sync(struct device *dev,
				struct dma_iova_state *state, size_t offset,
				size_t size)
{
	return 0;
}

static inline void dma_iova_unlink(struct device *dev,
				   struct dma_iova_state *state, size_t offset,
				   size_t size, enum dma_data_direction dir,
				   unsigned long attrs)
{
}
#endif

#endif /* MGPU_COMPAT_H */
