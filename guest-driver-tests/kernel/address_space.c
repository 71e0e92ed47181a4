// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The address space of a mirror: a context of the device of its own, because a
 * job that fails costs its context, with one address space, whose tables are in
 * tables.c; and the flush of what the device has cached of it.
 *
 * A flush has a lock, a command and a place in the ring that nothing else uses,
 * and it never waits for a job. Jobs wait for memory, and memory may wait for a
 * notifier, which waits for a flush. Nothing in it allocates what reclaims.
 */

#include <linux/delay.h>
#include <linux/slab.h>

#include "mgpu.h"
#include "mirrorgpu_job.h"

/* How often a flush that finds no room is tried, a millisecond apart. */
#define MGPU_FLUSH_ATTEMPTS	1000

/* The commands that end a context and make the next one, in this order. */
enum mgpu_as_command {
	MGPU_AS_END,
	MGPU_AS_CONTEXT,
	MGPU_AS_STAGING,
	MGPU_AS_CREATE,
};

static void mgpu_as_write_commands(struct mgpu_as *as)
{
	u64 root = mgpu_tables_root(as);
	const u32 staging[] = {
		mgpu_unit_resource(as->unit, MGPU_SPACE_STAGING), 0
	};
	const u32 create[] = { as->id, 0, lower_32_bits(root),
			       upper_32_bits(root) };
	const u32 context[18] = {};

	mgpu_command_words(as->commands[MGPU_AS_END],
			   VIRTIO_GPU_CMD_CTX_DESTROY, as->id, NULL, 0);
	mgpu_command_words(as->commands[MGPU_AS_CONTEXT],
			   VIRTIO_GPU_CMD_CTX_CREATE, as->id, context,
			   ARRAY_SIZE(context));
	mgpu_command_words(as->commands[MGPU_AS_STAGING],
			   VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, as->id, staging,
			   ARRAY_SIZE(staging));
	mgpu_command_words(as->commands[MGPU_AS_CREATE],
			   MIRRORGPU_CMD_AS_CREATE, as->id, create,
			   ARRAY_SIZE(create));
}

/*
 * Runs the commands [@from, @to) without waiting in between. The device begins
 * them in order, and no flush comes in between.
 */
static int mgpu_as_run(struct mgpu_as *as, unsigned int from, unsigned int to)
{
	struct mgpu_device *device = as->unit->device;
	unsigned int i, queued;
	int ret = 0, answer;

	mgpu_as_write_commands(as);
	mutex_lock(&device->flush_lock);
	for (i = from; i < to && !ret; i++) {
		ret = mgpu_command_queue(device, as->commands[i]);
		if (!ret)
			as->live = i == MGPU_AS_CREATE;
	}
	queued = ret ? i - 1 : i;
	mutex_unlock(&device->flush_lock);
	for (i = from; i < queued; i++) {
		answer = mgpu_command_wait(device, as->commands[i]);
		ret = ret ?: answer;
	}
	return ret;
}

/* Makes the context again, which is lost when a job fails. The tables stay. */
void mgpu_as_renew(struct mgpu_as *as)
{
	mgpu_as_run(as, MGPU_AS_END, MGPU_AS_COMMANDS);
}

static void mgpu_as_free(struct mgpu_as *as)
{
	unsigned int i;

	mgpu_tables_fini(as);
	for (i = 0; i < MGPU_AS_COMMANDS; i++)
		kfree(as->commands[i]);
	if (as->id)
		ida_free(&as->unit->device->contexts, as->id);
	as->id = 0;
}

static int mgpu_as_alloc(struct mgpu_as *as)
{
	struct mgpu_device *device = as->unit->device;
	unsigned int i;
	int id;

	for (i = 0; i < MGPU_AS_COMMANDS; i++) {
		as->commands[i] = mgpu_command_alloc(MGPU_COMMAND_ROOM);
		if (!as->commands[i])
			return -ENOMEM;
	}
	id = ida_alloc_range(&device->contexts, MGPU_UNITS + 1,
			     MGPU_CONTEXTS_MAX, GFP_KERNEL);
	if (id < 0)
		return id == -ENOSPC ? -EBUSY : id;
	as->id = id;
	/* A flush that finds no context waits for the end of the last one. */
	complete_all(&as->commands[MGPU_AS_END]->done);
	return mgpu_tables_init(as);
}

/* A context with an address space in which nothing is mapped. */
int mgpu_as_create(struct mgpu_as *as, struct mgpu_unit *unit)
{
	int ret;

	as->unit = unit;
	ret = mgpu_as_alloc(as);
	if (!ret) {
		ret = mgpu_as_run(as, MGPU_AS_CONTEXT, MGPU_AS_COMMANDS);
		/* Of what there is of it no job has been submitted. */
		if (ret)
			mgpu_as_run(as, MGPU_AS_END, MGPU_AS_END + 1);
	}
	if (ret)
		mgpu_as_free(as);
	return ret;
}

/*
 * Ends the context, with its jobs: the device uses neither tables nor pages of
 * it any more.
 */
void mgpu_as_end(struct mgpu_as *as)
{
	if (as->live && mgpu_as_run(as, MGPU_AS_END, MGPU_AS_END + 1))
		mgpu_device_stop(as->unit->device);
}

/* Frees what has ended. Nothing is mapped in it any more. */
void mgpu_as_destroy(struct mgpu_as *as)
{
	if (as->id)
		mgpu_as_free(as);
}

static void mgpu_flush_write(struct mgpu_device *device, struct mgpu_as *as,
			     unsigned long first, unsigned long last,
			     bool leaves)
{
	struct mirrorgpu_as_invalidate flush = {
		.asid = as->id,
		.flags = leaves ? MIRRORGPU_AS_INVALIDATE_LEAVES : 0,
		.first = (u64)first << PAGE_SHIFT,
		.last = min((u64)last, MGPU_LAST_PAGE) << PAGE_SHIFT |
			(PAGE_SIZE - 1),
	};
	const u32 words[] = {
		flush.asid, flush.flags,
		lower_32_bits(flush.first), upper_32_bits(flush.first),
		lower_32_bits(flush.last), upper_32_bits(flush.last),
	};

	mgpu_command_words(device->flush, MIRRORGPU_CMD_AS_INVALIDATE, as->id,
			   words, ARRAY_SIZE(words));
}

/* Memory for its mapping may be short for a moment; the ring has room. */
static int mgpu_flush_queue(struct mgpu_device *device)
{
	unsigned int attempt;
	int ret;

	for (attempt = 0; attempt < MGPU_FLUSH_ATTEMPTS; attempt++) {
		ret = mgpu_command_queue(device, device->flush);
		if (!ret || ret == -ENODEV)
			break;
		usleep_range(1000, 1100);
	}
	return ret;
}

/* Runs one flush, and says how it was answered. */
static int mgpu_flush_run(struct mgpu_as *as, unsigned long first,
			  unsigned long last, bool leaves)
{
	struct mgpu_device *device = as->unit->device;
	int ret;

	/* A seeded bug may have left the last one under way. */
	wait_for_completion(&device->flush->done);
	mgpu_flush_write(device, as, first, last, leaves);
	ret = mgpu_flush_queue(device);
	if (ret || mgpu_bug(MGPU_BUG_FLUSH_NOT_AWAITED))
		return ret;
	return mgpu_command_wait(device, device->flush);
}

/*
 * The device forgets what it has cached of pages [first, last]; of tables too
 * unless @leaves. When this returns, no packet uses an entry as it was before.
 * A device that does not do it is stopped, because pages are about to go.
 */
void mgpu_as_flush(struct mgpu_as *as, unsigned long first, unsigned long last,
		   bool leaves)
{
	struct mgpu_device *device = as->unit->device;
	int ret = 0;

	mutex_lock(&device->flush_lock);
	/* Without a context there is nothing to flush once it has ended. */
	if (as->live)
		ret = mgpu_flush_run(as, first, last, leaves);
	else
		wait_for_completion(&as->commands[MGPU_AS_END]->done);
	mutex_unlock(&device->flush_lock);
	if (!ret || ret == -ENODEV)
		return;
	dev_err(&device->vdev->dev, "No flush of the device's TLB: %d\n", ret);
	mgpu_device_stop(device);
}

/* Finds out whether the device has address spaces. */
int mgpu_device_probe_tables(struct mgpu_device *device)
{
	struct mgpu_as as = {};
	int ret;

	device->flush = mgpu_command_alloc(MGPU_COMMAND_ROOM);
	if (!device->flush)
		return -ENOMEM;
	complete_all(&device->flush->done);
	if (!mgpu_tables)
		return 0;
	ret = mgpu_as_create(&as, &device->units[0]);
	if (ret)
		return ret == -EIO ? 0 : ret;
	device->tables = true;
	mgpu_as_end(&as);
	mgpu_as_destroy(&as);
	return 0;
}

void mgpu_device_free_tables(struct mgpu_device *device)
{
	kfree(device->flush);
	ida_destroy(&device->contexts);
}
