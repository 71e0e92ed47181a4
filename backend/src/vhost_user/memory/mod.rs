//! The front-end's memory: [`region`] maps one region, [`table`] is the set of them and translates between its address
//! spaces, [`sigbus`] keeps a truncated file from killing the process. Knows nothing of the mirror: it hands out host
//! ranges, and a caller that removes a region has drained it first.

pub mod region;
pub mod sigbus;
pub mod table;

pub use region::{Region, RegionError, RegionSpec};
pub use table::{MemoryTable, TableError, Translation};
