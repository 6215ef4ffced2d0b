//! Changing what an image says about itself: identity, sector size, items of users.

use super::edit::{Placed, change_items, finish, refused, top};
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::format::items::ItemChange;
use crate::format::metadata::{
    CHS_PARAMETERS, FILE_PARAMETERS, FLAG_REQUIRED, FLAG_USER, FLAG_VIRTUAL_DISK, INCOMPLETE_FILE, ITEM_BYTES_MAX,
    LOGICAL_SECTOR_SIZE, PARENT_LOCATOR, PHYSICAL_SECTOR_SIZE, PMEM_LABELS, VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE,
};
use crate::image::session::Identity;
use crate::image::structure::Transaction;
use crate::image::{Image, Layer};

/// What becomes of an item of a user of the disk ([MS-VHDX] 2.6.1.2, IsUser).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserItem {
    /// Its name.
    pub id: Guid,
    /// Its new bytes, at most 1 MiB; `None` takes it out.
    pub value: Option<Vec<u8>>,
}

/// What [`set`] changes. What is `None` or empty stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetOptions {
    /// The identity that the guest sees (SCSI page 83).
    pub disk_id: Option<Guid>,
    /// 512 or 4096.
    pub physical_sector_size: Option<u32>,
    /// Items of users.
    pub user_items: Vec<UserItem>,
    /// Only find out what would change.
    pub dry_run: bool,
}

/// What [`set`] did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetReport {
    /// Sentences, one for each change.
    pub changes: Vec<String>,
    /// Whether the guest sees something else afterwards, so that the image gets a new data write GUID.
    pub visible: bool,
    /// Whether the metadata region had to be moved to be larger.
    pub region_moved: bool,
}

/// Changes items of the metadata of an image, all at one instant: a crash leaves all as they were, or all changed. The image
/// was opened for writing and is closed at the end.
///
/// What changes the disk as the guest sees it (identity, sector size) gives the image a new data write GUID; its children do
/// not accept it as their parent any more. [`find_children`](super::chain) finds them.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for a value that cannot be, or an item to be taken out that is not there;
/// [`ErrorKind::Limit`] when there is no room for more items; nothing has changed then, but for a log that was replayed.
/// [`ErrorKind::Io`] and [`ErrorKind::Poisoned`] as in writing: the change is there as a whole or not at all.
pub fn set(image: Image, options: &SetOptions) -> Result<SetReport> {
    let plan = plan(top(&image)?, options)?;
    let mut report = SetReport { visible: plan.visible, changes: plan.changes, region_moved: false };
    if options.dry_run || plan.items.is_empty() {
        return Ok(report);
    }
    let worked = apply(&image, &plan.items, plan.visible);
    report.region_moved = finish(&image, worked)? == Placed::NewRegion;
    Ok(report)
}

struct Plan {
    items: Vec<ItemChange>,
    changes: Vec<String>,
    visible: bool,
}

fn plan(layer: &Layer, options: &SetOptions) -> Result<Plan> {
    let metadata = layer.metadata();
    let mut plan = Plan { items: Vec::new(), changes: Vec::new(), visible: false };
    let flags = FLAG_REQUIRED | FLAG_VIRTUAL_DISK;
    if options.disk_id == Some(Guid::NIL) {
        let error =
            Error::new(ErrorKind::InvalidArgument, "the identity of a disk has to tell it apart, and is not nil");
        return Err(error.with_hint("draw a new one, for example with `uuidgen`"));
    }
    if let Some(id) = options.disk_id.filter(|id| *id != metadata.disk_id) {
        plan.changes.push(format!("virtual disk ID {} becomes {id}", metadata.disk_id));
        plan.items.push(ItemChange { id: VIRTUAL_DISK_ID, is_user: false, value: Some((flags, id.stored().to_vec())) });
        plan.visible = true;
    }
    if let Some(size) = options.physical_sector_size {
        if size != 512 && size != 4096 {
            let what = format!("a physical sector size of {size} is not allowed; choose 512 or 4096");
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        if size < metadata.logical_sector_size {
            let what = format!(
                "physical sectors of {size} bytes would be smaller than the logical ones of {}",
                metadata.logical_sector_size
            );
            return Err(refused(what, "the logical sector size of a disk cannot be changed"));
        }
        if size != metadata.physical_sector_size {
            plan.changes.push(format!("physical sector size {} becomes {size}", metadata.physical_sector_size));
            plan.items.push(ItemChange {
                id: PHYSICAL_SECTOR_SIZE,
                is_user: false,
                value: Some((flags, size.to_le_bytes().to_vec())),
            });
            plan.visible = true;
        }
    }
    for item in &options.user_items {
        plan_user_item(layer, item, &mut plan)?;
    }
    Ok(plan)
}

/// Items that mean something to whoever knows the format; no user item may have one of these names.
const OF_THE_FORMAT: [Guid; 9] = [
    FILE_PARAMETERS,
    VIRTUAL_DISK_SIZE,
    VIRTUAL_DISK_ID,
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    PARENT_LOCATOR,
    INCOMPLETE_FILE,
    CHS_PARAMETERS,
    PMEM_LABELS,
];

fn plan_user_item(layer: &Layer, item: &UserItem, plan: &mut Plan) -> Result<()> {
    let id = item.id;
    if plan.items.iter().any(|other| other.is_user && other.id == id) {
        return Err(Error::new(ErrorKind::InvalidArgument, format!("user item {id} is named twice")));
    }
    if item.value.is_some() && OF_THE_FORMAT.contains(&id) {
        let what =
            format!("{id} is an item of the format itself; with a user item of that name QEMU does not open the image");
        return Err(Error::new(ErrorKind::InvalidArgument, what)
            .with_hint("draw a GUID of your own, for example with `uuidgen`"));
    }
    let old = user_item(layer, id)?;
    let value = match (&item.value, old) {
        (None, None) => {
            return Err(Error::new(ErrorKind::InvalidArgument, format!("there is no user item {id}"))
                .with_hint("`vhdkit info` lists the items of an image"));
        }
        (Some(new), old) => {
            if new.len() as u64 > u64::from(ITEM_BYTES_MAX) {
                let what = format!("user item {id} would have {} bytes; 1 MiB is allowed", new.len());
                return Err(Error::new(ErrorKind::Limit, what));
            }
            match old {
                Some(old) if old == *new => return Ok(()),
                Some(old) => {
                    plan.changes.push(format!("user item {id} of {} bytes gets {} bytes", old.len(), new.len()))
                }
                None => plan.changes.push(format!("new user item {id} of {} bytes", new.len())),
            }
            Some((FLAG_USER, new.clone()))
        }
        (None, Some(old)) => {
            plan.changes.push(format!("user item {id} of {} bytes is taken out", old.len()));
            None
        }
    };
    plan.items.push(ItemChange { id, is_user: true, value });
    Ok(())
}

fn apply(image: &Image, items: &[ItemChange], visible: bool) -> Result<Placed> {
    let edit = image.edit(if visible { Identity::New } else { Identity::Kept })?;
    let mut transaction = Transaction::default();
    let mut regions = edit.layer().region_table().regions.clone();
    let placed = change_items(&edit, &mut regions, items, &mut transaction)?;
    if placed == Placed::NewRegion {
        edit.add_region_tables(&mut transaction, &regions)?;
    }
    edit.apply(transaction)?;
    edit.commit()?;
    Ok(placed)
}

/// The bytes of an item of a user; `None` when there is none of that name.
///
/// # Errors
/// When reading fails.
pub fn user_item(layer: &Layer, id: Guid) -> Result<Option<Vec<u8>>> {
    let Some(item) = layer.metadata().items.iter().find(|item| item.is_user() && item.id == id) else {
        return Ok(None);
    };
    if item.length == 0 {
        return Ok(Some(Vec::new()));
    }
    let start = layer.region_table().metadata.file_offset + u64::from(item.offset); // inside the region
    layer.view().read_vec(start..start + u64::from(item.length)).map(Some)
}
