// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Pages as I/O addresses: one range of them for up to a window of pages where
 * the kernel has such ranges and an IOMMU translates, else page by page.
 * Nothing here sleeps on reclaim, so it may be called in a notifier.
 */

#include "mgpu.h"

void mgpu_dma_begin(struct device *dev, struct mgpu_dma *dma)
{
	memset(dma, 0, sizeof(*dma));
	/* Where it fails, dma_use_iova() says so. */
	dma_iova_try_alloc(dev, &dma->state, 0, MGPU_WINDOW_BYTES);
}

/* Maps a page as entry @index. Returns DMA_MAPPING_ERROR if it cannot. */
dma_addr_t mgpu_dma_map(struct device *dev, struct mgpu_dma *dma,
			unsigned int index, struct page *page,
			enum dma_data_direction direction)
{
	size_t offset = (size_t)index << PAGE_SHIFT;
	dma_addr_t address;

	if (!dma_use_iova(&dma->state)) {
		address = dma_map_page(dev, page, 0, PAGE_SIZE, direction);
		return dma_mapping_error(dev, address) ? DMA_MAPPING_ERROR :
							 address;
	}
	if (dma_iova_link(dev, &dma->state, page_to_phys(page), offset,
			  PAGE_SIZE, direction, 0))
		return DMA_MAPPING_ERROR;
	return dma->state.addr + offset;
}

/* Makes what was mapped since @index known to the IOMMU. */
int mgpu_dma_sync(struct device *dev, struct mgpu_dma *dma, unsigned int index,
		  unsigned int count)
{
	if (!dma_use_iova(&dma->state))
		return 0;
	return dma_iova_sync(dev, &dma->state, (size_t)index << PAGE_SHIFT,
			     (size_t)count << PAGE_SHIFT);
}

/* Unmaps @count entries from @index on, all of which are mapped. */
void mgpu_dma_unmap(struct device *dev, struct mgpu_dma *dma,
		    unsigned int index, unsigned int count,
		    const dma_addr_t *addresses)
{
	unsigned int i;

	if (dma_use_iova(&dma->state)) {
		dma_iova_unlink(dev, &dma->state, (size_t)index << PAGE_SHIFT,
				(size_t)count << PAGE_SHIFT, DMA_BIDIRECTIONAL,
				0);
		return;
	}
	for (i = 0; i < count; i++)
		dma_unmap_page(dev, addresses[index + i], PAGE_SIZE,
			       DMA_BIDIRECTIONAL);
}

/* Gives the range back. Everything in it has been unmapped. */
void mgpu_dma_end(struct device *dev, struct mgpu_dma *dma)
{
	if (dma_use_iova(&dma->state))
		dma_iova_free(dev, &dma->state);
}
