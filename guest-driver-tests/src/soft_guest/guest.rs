//! A whole soft guest: memory, IOMMU, front-end, driver and display, put together and started.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::addr::{PAGE, Permission};
use super::backend::Backend;
use super::display::{Display, Manner};
use super::dma::{DmaBuffer, DmaSpace};
use super::dma_api::DmaApi;
use super::driver::{DriverConfig, GpuDriver, Queue};
use super::error::{Error, Result};
use super::frames::Frames;
use super::front_end::{FrontEnd, FrontEndConfig, Stopped, feature};
use super::gpu::{Command, Format, Rect};
use super::iommu::Iommu;
use super::memory::{GuestRam, RamConfig};
use super::oracle::LateTouch;

/// What kind of guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestConfig {
    /// Memory.
    pub ram: RamConfig,
    /// Front-end, with or without an IOMMU. Its ring features follow the driver's rings.
    pub front_end: FrontEndConfig,
    /// Driver.
    pub driver: DriverConfig,
    /// The display, if there is one.
    pub display: Option<Manner>,
    /// Decides how frames are scattered.
    pub seed: u64,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            ram: RamConfig::default(),
            front_end: FrontEndConfig::default(),
            driver: DriverConfig::default(),
            display: Some(Manner::Prompt),
            seed: 1,
        }
    }
}

impl GuestConfig {
    /// A guest without an IOMMU.
    pub fn without_iommu() -> Self {
        let mut config = Self::default();
        config.front_end.iommu = false;
        config
    }

    /// A guest without a display.
    pub fn headless() -> Self {
        Self { display: None, ..Self::default() }
    }

    /// A guest behind a front-end that passes all features through and has no display, like QEMU's
    /// vhost-user-test-device.
    pub fn with_rings() -> Self {
        let mut config = Self::headless();
        config.front_end.gpu_features |= feature::RESOURCE_BLOB | feature::CONTEXT_INIT;
        config
    }

    fn ring_features(&self) -> u64 {
        let rings = [self.driver.control, self.driver.cursor];
        let mut features = feature::RING_RESET;
        if rings.iter().any(|ring| ring.indirect) {
            features |= feature::INDIRECT;
        }
        if rings.iter().any(|ring| ring.event_idx) {
            features |= feature::EVENT_IDX;
        }
        features
    }
}

/// Width and height of the display's preferred mode.
pub const MODE: (u32, u32) = (640, 480);

/// A guest.
#[derive(Debug)]
pub struct SoftGuest {
    // Before the front-end in this list: the driver may still be used while the front-end is dropped.
    /// Its driver.
    pub driver: GpuDriver,
    /// The front-end: usable from other threads too.
    pub front_end: Arc<FrontEnd>,
    /// The display of the latest start.
    pub display: Option<Display>,
    /// Unmaps, from any thread.
    pub dma: DmaApi,
    config: GuestConfig,
    next_resource: u32,
}

impl SoftGuest {
    /// Boots a guest on a new connection to this back-end.
    pub fn boot(backend: &Backend, config: GuestConfig) -> Result<Self> {
        Self::boot_on(backend.connect()?, config)
    }

    /// Boots a guest on this connection.
    pub fn boot_on(stream: UnixStream, config: GuestConfig) -> Result<Self> {
        let mut guest = Self::connect(stream, config)?;
        guest.start()?;
        Ok(guest)
    }

    /// Everything but the start: the guest's driver has not said DRIVER_OK yet.
    pub fn connect(stream: UnixStream, config: GuestConfig) -> Result<Self> {
        let ram = Arc::new(GuestRam::new(config.ram)?);
        let frames = Arc::new(Frames::new(ram.clone(), config.seed));
        let iommu = Arc::new(Iommu::default());
        let mut front_end = config.front_end;
        front_end.ring_features = config.ring_features();
        let front_end = Arc::new(FrontEnd::connect(stream, ram, iommu.clone(), front_end)?);
        let space = DmaSpace::new(frames.clone(), iommu, config.front_end.iommu);
        let driver = GpuDriver::new(space.clone(), config.driver)?;
        let dma = DmaApi::new(space, front_end.clone(), Arc::new(LateTouch::new(frames)));
        Ok(Self { driver, front_end, display: None, dma, config, next_resource: 1 })
    }

    /// DRIVER_OK, or QMP `cont`: a new display socket, and the rings go on.
    pub fn start(&mut self) -> Result<()> {
        let (width, height) = MODE;
        let display = self.config.display.map(|manner| Display::new(manner, width, height)).transpose()?;
        self.front_end.start(&self.driver.queues(), display.as_ref().map(Display::socket))?;
        self.display = display;
        Ok(())
    }

    /// QMP `stop`.
    pub fn stop(&mut self) -> Result<Stopped> {
        self.front_end.stop(&self.driver.queues())
    }

    /// Reset and start over, as a reboot does: resources and everything in flight are gone.
    pub fn reboot(&mut self) -> Result<Stopped> {
        let stopped = self.front_end.reset(&self.driver.queues())?;
        self.driver.reset()?;
        self.start()?;
        Ok(stopped)
    }

    /// A resource with backing for `width` × `height` pixels in scattered frames. Its pixels are zeros.
    pub fn surface(&mut self, format: Format, width: u32, height: u32) -> Result<Surface> {
        let bytes = u64::from(width) * u64::from(height) * 4;
        let buffer = self.dma.space().allocate(bytes.div_ceil(PAGE) as usize, Permission::ReadWrite)?;
        self.surface_on(buffer, format, width, height)
    }

    /// The same on a buffer that is there already.
    pub fn surface_on(
        &mut self,
        buffer: DmaBuffer,
        format: Format,
        width: u32,
        height: u32,
    ) -> Result<Surface> {
        let resource = self.next_resource;
        self.next_resource += 1;
        let bytes = u64::from(width) * u64::from(height) * 4;
        self.driver.ok(&Command::create_2d(resource, format, width, height))?;
        self.driver.ok(&Command::attach_backing(resource, &buffer.segments(0, bytes)))?;
        Ok(Surface { resource, format, width, height, buffer })
    }

    /// Sends the whole surface to the host and shows it on scanout 0.
    pub fn show(&mut self, surface: &Surface) -> Result<()> {
        let rect = surface.rect();
        self.driver.ok(&Command::transfer(surface.resource, rect, 0))?;
        self.driver.ok(&Command::set_scanout(0, surface.resource, rect))?;
        self.driver.ok(&Command::flush(surface.resource, rect))?;
        Ok(())
    }

    /// Shows the surface, which holds `picture`, and compares what the display gets.
    pub fn must_show(&mut self, surface: &Surface, picture: &[u32]) -> Result<()> {
        self.show(surface)?;
        self.display_must_show(picture)
    }

    /// Compares what the display eventually shows on scanout 0 with `picture`.
    pub fn display_must_show(&self, picture: &[u32]) -> Result<()> {
        let display = self.display.as_ref().ok_or(Error::Closed { what: "there was no display" })?;
        display.must_show(0, picture, self.config.driver.timeout)?;
        match display.seen().nonsense.first() {
            None => Ok(()),
            Some(nonsense) => Err(Error::Reply { message: "display", got: nonsense.clone() }),
        }
    }

    /// Frees a resource as the stock driver does: UNREF, its reply, then unmap; the frames go to the oracle.
    pub fn free(&mut self, surface: Surface) -> Result<()> {
        self.driver.ok(&Command::unref(surface.resource))?;
        if surface.buffer.iova().is_some() {
            self.dma.unmap(surface.buffer)?;
        }
        Ok(())
    }

    /// Invalidates the pages of a ring, which stay mapped: the device must request them again.
    pub fn flush_ring(&mut self, queue: Queue) -> Result<()> {
        let memory = self.driver.ring(queue).memory();
        let (iova, len) = (memory.address(0), memory.pages() as u64 * PAGE);
        self.front_end.invalidate(iova, len).map(drop)
    }
}

/// A resource and its backing.
#[derive(Debug)]
pub struct Surface {
    /// The resource's id.
    pub resource: u32,
    /// Its pixel format.
    pub format: Format,
    /// Its width in pixels.
    pub width: u32,
    /// Its height in pixels.
    pub height: u32,
    /// Its pixels in guest memory.
    pub buffer: DmaBuffer,
}

impl Surface {
    /// All of it.
    pub fn rect(&self) -> Rect {
        Rect::sized(self.width, self.height)
    }

    /// Draws a picture of 0x00RRGGBB into the backing.
    pub fn draw(&self, picture: &[u32]) -> Result<()> {
        let bytes: Vec<u8> = picture.iter().flat_map(|&rgb| self.format.bytes(rgb, 0x77)).collect();
        self.buffer.write(0, &bytes)
    }
}

/// A picture in which neighbouring pixels differ, and which differs for each seed.
pub fn picture(width: u32, height: u32, seed: u32) -> Vec<u32> {
    let pixel = |x: u32, y: u32| {
        let mixed = (x | y << 16).wrapping_add(seed.wrapping_mul(0x85eb_ca6b)).wrapping_mul(0x9e37_79b1);
        (mixed ^ mixed >> 15) & 0xff_ffff
    };
    (0..height).flat_map(|y| (0..width).map(move |x| pixel(x, y))).collect()
}
