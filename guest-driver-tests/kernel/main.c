// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The virtio driver. It takes the GPU where virtio_gpu has not, and offers the
 * kernel's HMM tests two devices on it.
 */

#include <linux/module.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

#include "mgpu.h"

unsigned int mgpu_local_mib = 32;
module_param_named(local_mib, mgpu_local_mib, uint, 0444);
MODULE_PARM_DESC(local_mib, "MiB of device memory of each of the two devices, even, at most 128 (default: 32)");

bool mgpu_tables = true;
module_param_named(tables, mgpu_tables, bool, 0444);
MODULE_PARM_DESC(tables, "Whether jobs find pages by page tables of the device, if it has them, or each names its pages (default: 1)");

static void mgpu_device_free(struct kref *kref)
{
	kfree(container_of(kref, struct mgpu_device, kref));
}

void mgpu_device_get(struct mgpu_device *device)
{
	kref_get(&device->kref);
}

void mgpu_device_put(struct mgpu_device *device)
{
	kref_put(&device->kref, mgpu_device_free);
}

static struct mgpu_device *mgpu_device_alloc(struct virtio_device *vdev)
{
	struct mgpu_device *device;
	unsigned int i;

	device = kzalloc(sizeof(*device), GFP_KERNEL);
	if (!device)
		return NULL;
	kref_init(&device->kref);
	device->vdev = vdev;
	spin_lock_init(&device->queue_lock);
	init_rwsem(&device->gate);
	mutex_init(&device->mirrors_lock);
	mutex_init(&device->flush_lock);
	ida_init(&device->contexts);
	INIT_LIST_HEAD(&device->mirrors);
	for (i = 0; i < MGPU_UNITS; i++) {
		device->units[i].device = device;
		device->units[i].index = i;
	}
	return device;
}

/* The cursor queue is not used, but QEMU starts no device that lacks one. */
static int mgpu_find_queues(struct mgpu_device *device)
{
	struct virtqueue_info infos[] = {
		{ .name = "control", .callback = mgpu_queue_interrupt },
		{ .name = "cursor" },
	};
	struct virtqueue *queues[ARRAY_SIZE(infos)];
	int ret;

	ret = virtio_find_vqs(device->vdev, ARRAY_SIZE(infos), queues, infos,
			      NULL);
	if (ret)
		return ret;
	device->queue = queues[0];
	device->dma = virtqueue_dma_dev(device->queue);
	if (!device->dma) {
		dev_err(&device->vdev->dev, "Needs iommu_platform=on\n");
		device->vdev->config->del_vqs(device->vdev);
		return -ENODEV;
	}
	return 0;
}

/*
 * Takes everything back in the order of its use: first the requests end, then
 * pages leave the device's memory and their mappings go, and only then is the
 * device reset and its own memory freed.
 */
static void mgpu_device_teardown(struct mgpu_device *device)
{
	struct mgpu_mirror *mirror;
	unsigned int i;

	for (i = 0; i < MGPU_UNITS; i++)
		mgpu_chardev_unregister(&device->units[i]);
	down_write(&device->gate);
	device->gone = true;
	up_write(&device->gate);

	for (i = 0; i < MGPU_UNITS; i++)
		if (device->units[i].local)
			mgpu_migrate_evict(&device->units[i]);
	mutex_lock(&device->mirrors_lock);
	list_for_each_entry(mirror, &device->mirrors, node)
		mgpu_mirror_end(mirror);
	mutex_unlock(&device->mirrors_lock);

	mgpu_device_stop(device);
	for (i = 0; i < MGPU_UNITS; i++)
		mgpu_unit_fini(&device->units[i]);
	mgpu_device_free_tables(device);
	device->vdev->config->del_vqs(device->vdev);
}

static int mgpu_probe(struct virtio_device *vdev)
{
	struct mgpu_device *device;
	unsigned int i;
	int ret;

	if (!virtio_has_feature(vdev, VIRTIO_GPU_F_VIRGL)) {
		dev_err(&vdev->dev, "This GPU takes no jobs\n");
		return -ENODEV;
	}
	device = mgpu_device_alloc(vdev);
	if (!device)
		return -ENOMEM;
	vdev->priv = device;
	ret = mgpu_find_queues(device);
	if (ret) {
		mgpu_device_put(device);
		return ret;
	}
	virtio_device_ready(vdev);

	for (i = 0; i < MGPU_UNITS && !ret; i++)
		ret = mgpu_unit_init(&device->units[i]);
	ret = ret ?: mgpu_device_probe_tables(device);
	for (i = 0; i < MGPU_UNITS && !ret; i++)
		ret = mgpu_chardev_register(&device->units[i]);
	if (ret) {
		mgpu_device_teardown(device);
		mgpu_device_put(device);
	}
	return ret;
}

static void mgpu_remove(struct virtio_device *vdev)
{
	struct mgpu_device *device = vdev->priv;

	mgpu_device_teardown(device);
	mgpu_device_put(device);
}

static const struct virtio_device_id mgpu_ids[] = {
	{ VIRTIO_ID_GPU, VIRTIO_DEV_ANY_ID },
	{},
};

static const unsigned int mgpu_features[] = { VIRTIO_GPU_F_VIRGL };

static struct virtio_driver mgpu_driver = {
	.driver.name = "mirrorgpu_hmm",
	.id_table = mgpu_ids,
	.feature_table = mgpu_features,
	.feature_table_size = ARRAY_SIZE(mgpu_features),
	.probe = mgpu_probe,
	.remove = mgpu_remove,
};

module_virtio_driver(mgpu_driver);

/* No device table: the module must be asked for, or it would take GPUs from virtio_gpu. */
MODULE_DESCRIPTION("MirrorGPU under the kernel's HMM tests");
MODULE_LICENSE("Dual BSD/GPL");
