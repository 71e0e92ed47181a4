/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/* The types of <stdint.h> that mirrorgpu_job.h needs; the kernel has no such header. */
#include <linux/types.h>
