// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * /dev/hmm_dmirror0 and 1: each open file is the mirror of the process that
 * opened it. Data goes through a bounce buffer of a window, because nothing may
 * touch user memory while the engine is held.
 */

#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/mm.h>
#include <linux/uaccess.h>

#include "mgpu.h"

/* A request as it is carried out. */
struct mgpu_request {
	struct mgpu_hmm_request user;
	unsigned long start, end;
	void *bounce;
};

static int mgpu_chardev_open(struct inode *inode, struct file *file)
{
	struct mgpu_unit *unit =
		container_of(file->private_data, struct mgpu_unit, misc);
	struct mgpu_mirror *mirror = mgpu_mirror_open(unit);

	if (IS_ERR(mirror))
		return PTR_ERR(mirror);
	mgpu_device_get(unit->device);
	file->private_data = mirror;
	return 0;
}

static int mgpu_chardev_release(struct inode *inode, struct file *file)
{
	struct mgpu_mirror *mirror = file->private_data;
	struct mgpu_device *device = mirror->unit->device;

	mgpu_mirror_close(mirror);
	mgpu_device_put(device);
	return 0;
}

/*
 * Copies a window, and looks pages up as long as some are missing. Each job that
 * pages were taken from is followed by one half as long, so that one gets through
 * beside notifiers without a pause.
 */
static int mgpu_copy_window(struct mgpu_mirror *mirror,
			    struct mgpu_request *request, unsigned long start,
			    unsigned long npages, enum mgpu_lookup lookup)
{
	bool write = lookup == MGPU_LOOKUP_WRITE;
	unsigned long done = 0, most = npages, copied;
	int ret;

	while (done < npages) {
		copied = 0;
		ret = mgpu_mirror_copy(mirror, start + (done << PAGE_SHIFT),
				       min(most, npages - done),
				       request->bounce + (done << PAGE_SHIFT),
				       write, &copied);
		done += copied;
		if (ret == -EAGAIN && !fatal_signal_pending(current)) {
			most = max(most / 2, 1UL);
			continue;
		}
		if (!ret)
			continue;
		if (ret != -ENOENT || lookup == MGPU_LOOKUP_LOCAL)
			return ret;
		ret = mgpu_mirror_fault(mirror, start + (done << PAGE_SHIFT),
					request->end, lookup);
		if (ret)
			return ret;
		request->user.faults++;
	}
	return 0;
}

static int mgpu_request_copy(struct mgpu_mirror *mirror,
			     struct mgpu_request *request,
			     enum mgpu_lookup lookup)
{
	void __user *data = u64_to_user_ptr(request->user.ptr);
	unsigned long at, bytes;
	int ret;

	for (at = request->start; at < request->end; at += bytes, data += bytes) {
		bytes = min(request->end - at, MGPU_WINDOW_BYTES);
		if (lookup == MGPU_LOOKUP_WRITE &&
		    copy_from_user(request->bounce, data, bytes))
			return -EFAULT;
		ret = mgpu_copy_window(mirror, request, at, bytes >> PAGE_SHIFT,
				       lookup);
		if (ret)
			return ret;
		if (lookup != MGPU_LOOKUP_WRITE &&
		    copy_to_user(data, request->bounce, bytes))
			return -EFAULT;
		request->user.cpages += bytes >> PAGE_SHIFT;
	}
	return 0;
}

static int mgpu_request_snapshot(struct mgpu_mirror *mirror,
				 struct mgpu_request *request)
{
	void __user *data = u64_to_user_ptr(request->user.ptr);
	unsigned long at, npages;
	int ret;

	for (at = request->start; at < request->end;
	     at += npages << PAGE_SHIFT, data += npages) {
		npages = min(request->end - at, MGPU_WINDOW_BYTES) >> PAGE_SHIFT;
		ret = mgpu_mirror_snapshot(mirror, at, npages, request->bounce);
		if (ret)
			return ret;
		if (copy_to_user(data, request->bounce, npages))
			return -EFAULT;
		request->user.cpages += npages;
	}
	return 0;
}

/* Pages go to the unit's memory; what it then reads there goes to the user. */
static int mgpu_request_migrate(struct mgpu_mirror *mirror,
				struct mgpu_request *request)
{
	int ret;

	ret = mgpu_migrate_to_local(mirror, request->start, request->end);
	if (!ret)
		ret = mgpu_mirror_fault(mirror, request->start, request->end,
					MGPU_LOOKUP_LOCAL);
	return ret ?: mgpu_request_copy(mirror, request, MGPU_LOOKUP_LOCAL);
}

static int mgpu_request_exclusive(struct mgpu_mirror *mirror,
				  struct mgpu_request *request)
{
	int ret;

	ret = mgpu_mirror_make_exclusive(mirror, request->start, request->end);
	return ret ?: mgpu_request_copy(mirror, request, MGPU_LOOKUP_LOCAL);
}

/* Requests that name pages of the process. */
static int mgpu_request_pages(struct mgpu_mirror *mirror,
			      struct mgpu_request *request, unsigned int number)
{
	switch (number) {
	case MGPU_HMM_READ:
		return mgpu_request_copy(mirror, request, MGPU_LOOKUP_READ);
	case MGPU_HMM_READ_UNLOCKED:
		return mgpu_request_copy(mirror, request,
					 MGPU_LOOKUP_READ_UNLOCKED);
	case MGPU_HMM_WRITE:
		return mgpu_request_copy(mirror, request, MGPU_LOOKUP_WRITE);
	case MGPU_HMM_MIGRATE_TO_DEV:
		return mgpu_request_migrate(mirror, request);
	case MGPU_HMM_MIGRATE_TO_SYS:
		return mgpu_migrate_to_system(mirror, request->start,
					      request->end,
					      &request->user.cpages);
	case MGPU_HMM_SNAPSHOT:
		return mgpu_request_snapshot(mirror, request);
	case MGPU_HMM_EXCLUSIVE:
		return mgpu_request_exclusive(mirror, request);
	case MGPU_HMM_CHECK_EXCLUSIVE:
		return mgpu_mirror_check_exclusive(mirror, request->start,
						   request->end);
	}
	return -ENOTTY;
}

/* Runs a request about pages with the mm and a bounce buffer held. */
static int mgpu_request_run(struct mgpu_mirror *mirror,
			    struct mgpu_request *request, unsigned int number)
{
	struct mm_struct *mm = mirror->notifier.mm;
	u64 bytes = request->user.npages << PAGE_SHIFT;
	int ret;

	request->start = request->user.addr;
	if (!PAGE_ALIGNED(request->user.addr) ||
	    bytes >> PAGE_SHIFT != request->user.npages ||
	    check_add_overflow(request->start, bytes, &request->end) ||
	    request->end >> PAGE_SHIFT > MGPU_LAST_PAGE)
		return -EINVAL;
	if (!mmget_not_zero(mm))
		return -EFAULT;
	request->bounce = kvmalloc(MGPU_WINDOW_BYTES, GFP_KERNEL);
	ret = request->bounce ? mgpu_request_pages(mirror, request, number) :
				-ENOMEM;
	kvfree(request->bounce);
	mmput(mm);
	return ret;
}

static int mgpu_request_dispatch(struct mgpu_mirror *mirror,
				 struct mgpu_request *request,
				 unsigned int number)
{
	switch (number) {
	case MGPU_HMM_FLAGS:
		mirror->flags = request->user.npages;
		return 0;
	case MGPU_HMM_RELEASE:
		return mirror->unit->local ? mgpu_migrate_evict(mirror->unit) : 0;
	default:
		return mgpu_request_run(mirror, request, number);
	}
}

static long mgpu_chardev_ioctl(struct file *file, unsigned int number,
			       unsigned long argument)
{
	struct mgpu_mirror *mirror = file->private_data;
	struct mgpu_device *device = mirror->unit->device;
	void __user *user = (void __user *)argument;
	struct mgpu_request request = {};
	int ret = -ENODEV;

	if (copy_from_user(&request.user, user, sizeof(request.user)))
		return -EFAULT;
	request.user.cpages = 0;
	request.user.faults = 0;
	down_read(&device->gate);
	if (!device->gone)
		ret = mgpu_request_dispatch(mirror, &request, number);
	up_read(&device->gate);
	if (ret)
		return ret;
	return copy_to_user(user, &request.user, sizeof(request.user)) ?
		       -EFAULT : 0;
}

/* A page of ours for each of the mapping: what a driver's own mapping looks like to HMM. */
static int mgpu_chardev_mmap(struct file *file, struct vm_area_struct *vma)
{
	unsigned long address;
	struct page *page;
	int ret;

	for (address = vma->vm_start; address < vma->vm_end;
	     address += PAGE_SIZE) {
		page = alloc_page(GFP_KERNEL | __GFP_ZERO | __GFP_ACCOUNT);
		if (!page)
			return -ENOMEM;
		ret = vm_insert_page(vma, address, page);
		put_page(page);
		if (ret)
			return ret;
	}
	return 0;
}

static const struct file_operations mgpu_chardev_ops = {
	.owner = THIS_MODULE,
	.open = mgpu_chardev_open,
	.release = mgpu_chardev_release,
	.unlocked_ioctl = mgpu_chardev_ioctl,
	.mmap = mgpu_chardev_mmap,
	.llseek = noop_llseek,
};

int mgpu_chardev_register(struct mgpu_unit *unit)
{
	int ret;

	unit->misc.minor = MISC_DYNAMIC_MINOR;
	unit->misc.name = unit->name;
	unit->misc.fops = &mgpu_chardev_ops;
	unit->misc.parent = &unit->device->vdev->dev;
	ret = misc_register(&unit->misc);
	if (ret)
		unit->misc.fops = NULL;
	return ret;
}

void mgpu_chardev_unregister(struct mgpu_unit *unit)
{
	if (unit->misc.fops)
		misc_deregister(&unit->misc);
	unit->misc.fops = NULL;
}
